// Work that data workers do for each utterance, on NumPy arrays, with the GIL released. This module does not use torch,
// so workers need not load torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../common/lanes.h"

namespace py = pybind11;

namespace {

using Waveform = py::array_t<float, py::array::c_style | py::array::forcecast>;

struct Span {
  const float* data;
  int64_t size;
};

// Sum of f(sample) in double.
template <typename Function>
double sum_over(const Span& span, const Function& f) {
  return fastssl::sum_in_order<8, double>(span.size, [&](int64_t i) { return f(static_cast<double>(span.data[i])); });
}

// Concatenates waveforms. `normalize` first scales each to zero mean and unit variance.
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

using Costs = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Finds the sequence of classes with the lowest total cost: the cost of each frame's class, plus `price` for each run
// of equal classes. For each frame and class, `changes` records whether the best path enters the class from another
// one. That other class is the cheapest so far, and is the same for all classes of the frame.
py::array_t<int64_t> smooth_classes(const Costs& costs, double price) {
  if (costs.ndim() != 2 || costs.shape(1) < 1) {
    throw std::invalid_argument("costs: expected (frames, classes)");
  }
  const int64_t frames = costs.shape(0), classes = costs.shape(1);
  py::array_t<int64_t> chosen(frames);
  int64_t* out = chosen.mutable_data();
  const float* row = costs.data();
  py::gil_scoped_release release;
  std::vector<double> totals(classes, 0.0);
  std::vector<int64_t> cheapest(frames);
  std::vector<uint8_t> changes(frames * classes);
  for (int64_t frame = 0; frame < frames; ++frame, row += classes) {
    cheapest[frame] = std::min_element(totals.begin(), totals.end()) - totals.begin();
    const double changed = totals[cheapest[frame]] + price;
    uint8_t* change = changes.data() + frame * classes;
    double* total = totals.data();
    for (int64_t k = 0; k < classes; ++k) {
      change[k] = changed < total[k];
      total[k] = (changed < total[k] ? changed : total[k]) + row[k];
    }
  }
  if (frames == 0) {
    return chosen;
  }
  int64_t current = std::min_element(totals.begin(), totals.end()) - totals.begin();
  for (int64_t frame = frames - 1; frame >= 0; --frame) {
    out[frame] = current;
    if (changes[frame * classes + current]) {
      current = cheapest[frame];
    }
  }
  return chosen;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("pack_waveforms", &pack_waveforms, py::arg("waveforms"), py::arg("normalize"), py::arg("eps"));
  m.def("smooth_classes", &smooth_classes, py::arg("costs"), py::arg("price"));
}
