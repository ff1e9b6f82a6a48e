// An allocator for PyTorch's tensors on the CPU. While guarding is on, each tensor lies between two pages that cannot
// be accessed; an access there ends the process with a message that names the tensor. A tensor lies either at the end
// of its pages, to find accesses after it, or at their beginning, to find those before it. Fresh memory and the bytes
// beside a tensor are 0xff, which is NaN in every floating-point type. Writes beside a tensor are found after a launch.

#include "include/guarded_memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include <c10/core/CPUAllocator.h>

namespace guarded {
namespace {

constexpr std::size_t kPage = 4096;
constexpr unsigned char kPoison = 0xff;
constexpr int kStatus = 3;  // of a process that is ended on purpose

enum class Place { kOff, kEnd, kBegin };

struct Buffer {
  unsigned char* pages;  // the first and the last of them cannot be accessed
  std::size_t total;
  std::size_t bytes;
  std::string name;
};

Place place = Place::kOff;
std::map<void*, Buffer> buffers;  // by where the tensor begins
std::string launched = "no kernel";

// Splits arguments at commas outside of parentheses, and cuts each at its first dot: "x" of "x.data_ptr<float>()".
std::vector<std::string> split(const std::string& arguments) {
  std::vector<std::string> parts(1);
  int nested = 0;
  for (const char c : arguments) {
    nested += c == '(' ? 1 : c == ')' ? -1 : 0;
    if (c == ',' && nested == 0) {
      parts.emplace_back();
    } else if (c != ' ' || !parts.back().empty()) {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) {
    part = part.substr(0, part.find('.'));
  }
  return parts;
}

void explain_fault(int, siginfo_t* info, void*) {
  auto* address = static_cast<unsigned char*>(info->si_addr);
  char message[512];
  for (const auto& [begin, buffer] : buffers) {
    if (address >= buffer.pages && address < buffer.pages + buffer.total) {
      const std::ptrdiff_t offset = address - static_cast<unsigned char*>(begin);
      const bool after = offset >= 0;
      std::snprintf(
          message,
          sizeof message,
          "access outside of `%s` (%zu bytes): %td bytes %s",
          buffer.name.c_str(),
          buffer.bytes,
          after ? offset - static_cast<std::ptrdiff_t>(buffer.bytes) : -offset,
          after ? "after its end" : "before its beginning");
      stop(message);
    }
  }
  std::snprintf(message, sizeof message, "access to %p, outside of all buffers", info->si_addr);
  stop(message);
}

struct Allocator final : c10::Allocator {
  c10::Allocator* plain = c10::GetDefaultCPUAllocator();

  static void free_guarded(void* begin) {
    const auto found = buffers.find(begin);
    munmap(found->second.pages, found->second.total);
    buffers.erase(found);
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    if (place == Place::kOff || bytes == 0) {
      return plain->allocate(bytes);
    }
    const std::size_t inner = (bytes + kPage - 1) / kPage * kPage, total = inner + 2 * kPage;
    void* mapped = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
      stop("no memory");
    }
    auto* pages = static_cast<unsigned char*>(mapped);
    std::memset(pages + kPage, kPoison, inner);
    mprotect(pages, kPage, PROT_NONE);
    mprotect(pages + kPage + inner, kPage, PROT_NONE);
    void* begin = pages + kPage + (place == Place::kEnd ? inner - bytes : 0);
    buffers[begin] = {pages, total, bytes, "a tensor that is not an argument"};
    return {begin, begin, free_guarded, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;  // a tensor's context is not always its data
  }

  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

}  // namespace

void begin_launch(const char* where, const char* names, const std::vector<const void*>& arguments) {
  launched = where;
  const std::vector<std::string> parts = split(names);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const auto found = buffers.find(const_cast<void*>(arguments[i]));
    if (found != buffers.end()) {
      found->second.name = parts.at(i);
    }
  }
}

void end_launch() {
  for (const auto& [begin, buffer] : buffers) {
    const unsigned char* first = buffer.pages + kPage;
    const unsigned char* end = buffer.pages + buffer.total - kPage;
    const auto* data = static_cast<const unsigned char*>(begin);
    const auto written = [](unsigned char byte) { return byte != kPoison; };
    if (std::any_of(first, data, written) || std::any_of(data + buffer.bytes, end, written)) {
      stop(("something was written beside `" + buffer.name + "`").c_str());
    }
  }
}

void stop(const char* message) {
  std::fprintf(stderr, "kernel launched in %s: %s\n", launched.c_str(), message);
  _exit(kStatus);
}

extern "C" __attribute__((visibility("default"))) void set_guard(int where) {
  static const bool installed = [] {
    static Allocator allocator;
    c10::SetCPUAllocator(&allocator, 1);
    static char stack[65536];
    const stack_t alternate = {stack, 0, sizeof stack};  // because the fault may be an overflow of the other stack
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = explain_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  static_cast<void>(installed);
  place = static_cast<Place>(where);
}

}  // namespace guarded
