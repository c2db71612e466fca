// The module rwn_ext._cpu. Addresses and sizes in, exceptions out; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "weight_grad.h"

namespace py = pybind11;

namespace rwn::cpu {
namespace {

using Pair = std::array<int, 2>;
using Quadruple = std::array<int, 4>;
using Strides = std::array<int64_t, 4>;

const Code& code_named(const std::string& name) {
  std::string able;
  for (const Code* const* code = codes(); *code; ++code) {
    if (name == (*code)->name) return **code;
    able += (able.empty() ? "" : ", ") + std::string((*code)->name);
  }
  throw py::value_error("instructions='" + name + "' cannot run here; choose one of " + able);
}

// One problem with all that does not change from call to call.
class WeightGrad {
 public:
  WeightGrad(const Quadruple& input_size, const Strides& input_stride, const Pair& output_size,
             const Strides& gradient_stride, std::vector<int64_t> filters, const Strides& result_stride,
             const Pair& kernel_size, const Pair& stride, const Pair& padding, const Pair& dilation, bool depthwise,
             const std::string& instructions)
      : code_(instructions.empty() ? code_for(input_size[1], depthwise) : code_named(instructions)),
        filters_(std::move(filters)) {
    if (filters_.empty()) throw py::value_error("filters=[] asks for the gradient of no filter");
    if (depthwise && input_size[1] != int(filters_.size())) {
      throw py::value_error("input_size has " + std::to_string(input_size[1]) + " channels for " +
                            std::to_string(filters_.size()) + " depthwise filters, it needs one for each");
    }
    Problem& p = problem_;
    p.depthwise = depthwise;
    p.batch = input_size[0], p.channels = input_size[1], p.height = input_size[2], p.width = input_size[3];
    p.learned = int(filters_.size()), p.out_height = output_size[0], p.out_width = output_size[1];
    p.kernel_h = kernel_size[0], p.kernel_w = kernel_size[1], p.stride_h = stride[0], p.stride_w = stride[1];
    p.padding_h = padding[0], p.padding_w = padding[1], p.dilation_h = dilation[0], p.dilation_w = dilation[1];
    for (int i = 0; i < 4; ++i) {
      p.input_stride[i] = input_stride[i], p.gradient_stride[i] = gradient_stride[i];
      p.result_stride[i] = result_stride[i];
    }
    p.block_floats = block_floats();
  }

  void operator()(uintptr_t input, uintptr_t grad_output, uintptr_t result, uintptr_t bias, int threads) const {
    if (bias && problem_.depthwise) throw py::value_error("bias is not computed beside depthwise filters");
    if (!result || (problem_.batch && (!input || !grad_output))) throw py::value_error("an operand has no memory");
    if (threads < 1) throw py::value_error("threads=" + std::to_string(threads) + " is less than 1");
    py::gil_scoped_release release;
    weight_grad(code_, problem_, reinterpret_cast<const float*>(input), reinterpret_cast<const float*>(grad_output),
                filters_.data(), reinterpret_cast<float*>(result), reinterpret_cast<float*>(bias), threads);
  }

 private:
  const Code& code_;
  const std::vector<int64_t> filters_;
  Problem problem_{};
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  py::list names;
  for (const Code* const* code = codes(); *code; ++code) names.append((*code)->name);
  m.attr("INSTRUCTIONS") = py::tuple(names);
  py::class_<WeightGrad>(m, "WeightGrad")
      .def(py::init<const Quadruple&, const Strides&, const Pair&, const Strides&, std::vector<int64_t>, const Strides&,
                    const Pair&, const Pair&, const Pair&, const Pair&, bool, const std::string&>(),
           py::arg("input_size"), py::arg("input_stride"), py::arg("output_size"), py::arg("grad_output_stride"),
           py::arg("filters"), py::arg("result_stride"), py::arg("kernel_size"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("depthwise") = false, py::arg("instructions") = "")
      .def("__call__", &WeightGrad::operator(), py::arg("input"), py::arg("grad_output"), py::arg("result"),
           py::arg("bias"), py::arg("threads"));
}

}  // namespace rwn::cpu
