// What data workers do to every utterance, on numpy arrays, with the GIL released. No torch: a worker need not load it.

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

using Waveform = py::array_t<float, py::array::c_style | py::array::forcecast>;

struct Span {
  const float* data;
  int64_t size;
};

// Sum of f(sample) in double, in eight partial sums of a fixed order.
template <typename Function>
double sum_over(const Span& span, const Function& f) {
  double partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= span.size; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      partial[lane] += f(static_cast<double>(span.data[i + lane]));
    }
  }
  double sum = 0;
  for (; i < span.size; ++i) {
    sum += f(static_cast<double>(span.data[i]));
  }
  for (const double lane : partial) {
    sum += lane;
  }
  return sum;
}

// Concatenate waveforms; with `normalize`, each to zero mean and unit variance on the way.
py::array_t<float> pack_waveforms(const std::vector<Waveform>& waveforms, bool normalize, double eps) {
  std::vector<Span> spans;
  int64_t total = 0;
  for (size_t i = 0; i < waveforms.size(); ++i) {
    if (waveforms[i].ndim() != 1) {
      throw std::invalid_argument(
          "waveforms: number " + std::to_string(i) + " has " + std::to_string(waveforms[i].ndim()) +
          " dimensions, expected 1");
    }
    spans.push_back({waveforms[i].data(), static_cast<int64_t>(waveforms[i].size())});
    total += spans.back().size;
  }
  py::array_t<float> packed(total);
  float* out = packed.mutable_data();
  {
    py::gil_scoped_release release;
    for (const Span& span : spans) {
      double mean = 0, scale = 1;
      if (normalize && span.size > 0) {
        mean = sum_over(span, [](double sample) { return sample; }) / span.size;
        const double variance =
            sum_over(span, [mean](double sample) { return (sample - mean) * (sample - mean); }) / span.size;
        scale = 1 / std::sqrt(variance + eps);
      }
      for (int64_t i = 0; i < span.size; ++i) {
        out[i] = static_cast<float>((span.data[i] - mean) * scale);
      }
      out += span.size;
    }
  }
  return packed;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("pack_waveforms", &pack_waveforms, py::arg("waveforms"), py::arg("normalize"), py::arg("eps"));
}
