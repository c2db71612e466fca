// The module rwn_ext._cuda: plans, device facts, launches. Addresses and sizes in, exceptions out; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernels.h"
#include "launch.h"

namespace py = pybind11;

namespace rwn {
namespace {

using Pair = std::array<int, 2>;
using Quadruple = std::array<int, 4>;
using Strides = std::array<int64_t, 4>;

Problem make_problem(const Quadruple& input_size, const Strides& input_strides, const Pair& output_size,
                     const Strides& grad_output_strides, const Strides& result_strides, int learned,
                     const Pair& kernel_size, const Pair& stride, const Pair& padding, const Pair& dilation,
                     bool depthwise, bool aligned, bool normed, int type, int result_type) {
  if (type < 0 || type > 2 || result_type < 0 || result_type > 2) throw py::value_error("type is 0, 1 or 2");
  Problem p{};
  p.batch = input_size[0], p.channels = input_size[1], p.height = input_size[2], p.width = input_size[3];
  p.learned = learned, p.out_height = output_size[0], p.out_width = output_size[1];
  p.kernel_h = kernel_size[0], p.kernel_w = kernel_size[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1], p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.depthwise = depthwise, p.aligned = aligned, p.normed = normed;
  p.type = Type(type), p.out_type = Type(result_type);
  for (int i = 0; i < 4; ++i) {
    p.x_stride[i] = input_strides[i];
    p.gradient_stride[i] = grad_output_strides[i];
    p.out_stride[i] = result_strides[i];
  }
  return p;
}

Kernel kernel_named(const std::string& name) {
  for (const Kernel kernel : {Kernel::ffma, Kernel::mma, Kernel::wgmma, Kernel::depthwise}) {
    if (name == name_of(kernel)) return kernel;
  }
  throw py::value_error("kernel='" + name + "' is unknown; choose ffma, mma, wgmma or depthwise");
}

void weight_grad(const Plan& plan, uintptr_t input, uintptr_t grad_output, uintptr_t filters, int64_t first_filter,
                 uintptr_t scale, uintptr_t shift, uintptr_t result, uintptr_t workspace, uintptr_t counters,
                 uintptr_t stream) {
  if (plan.workspace > 0 && (workspace == 0 || counters == 0)) throw py::value_error("the plan needs a workspace");
  if (plan.problem.normed && (scale == 0 || shift == 0)) throw py::value_error("the plan needs scale and shift");
  launch(plan,
         {reinterpret_cast<const void*>(input), reinterpret_cast<const void*>(grad_output),
          reinterpret_cast<const int64_t*>(filters), first_filter, reinterpret_cast<const float*>(scale),
          reinterpret_cast<const float*>(shift), reinterpret_cast<void*>(result), reinterpret_cast<float*>(workspace),
          reinterpret_cast<unsigned*>(counters)},
         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels for the weight gradient of few filters: rwn_ext/cuda.py is their user.";

  py::class_<Problem>(module, "Problem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("input_size"), py::arg("input_strides"),
           py::arg("output_size"), py::arg("grad_output_strides"), py::arg("result_strides"), py::arg("learned"),
           py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("depthwise"),
           py::arg("aligned"), py::arg("normed"), py::arg("type"), py::arg("result_type"));
  py::class_<Device>(module, "Device")
      .def(py::init([](int capability, int multiprocessors, int block_memory, int multiprocessor_memory,
                       double bandwidth) {
             return Device{capability,  multiprocessors, block_memory, multiprocessor_memory, bandwidth,
                           kernels_built(capability)};
           }),
           py::kw_only(), py::arg("capability"), py::arg("multiprocessors"), py::arg("block_memory"),
           py::arg("multiprocessor_memory"), py::arg("bandwidth"))
      .def_readonly("capability", &Device::capability)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("block_memory", &Device::block_memory)
      .def_readonly("multiprocessor_memory", &Device::multiprocessor_memory)
      .def_readonly("bandwidth", &Device::bandwidth);
  py::class_<Plan>(module, "Plan")
      .def_property_readonly("kernel", [](const Plan& plan) { return name_of(plan.kernel); })
      .def_readonly("width", &Plan::width)
      .def_readonly("vector", &Plan::vector)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("blocks_per_multiprocessor", &Plan::blocks_per_multiprocessor)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("shared_memory", &Plan::shared_memory)
      .def_readonly("workspace", &Plan::workspace)
      .def_readonly("counters", &Plan::counters)
      .def_readonly("bytes", &Plan::bytes)
      .def_readonly("flops", &Plan::flops)
      .def_readonly("microseconds", &Plan::microseconds)
      .def_property_readonly("splits", [](const Plan& plan) { return plan.task.splits; })
      .def_property_readonly("channels_per_block", [](const Plan& plan) { return plan.task.tile_channels; })
      .def_property_readonly("columns_per_block", [](const Plan& plan) { return plan.task.tile_columns; })
      .def("__repr__", [](const Plan& plan) { return to_string(plan); });

  module.def("device", &device_of, py::arg("index"));
  module.def("obstacle",
             [](const Problem& problem, const Device& device, const std::string& kernel) {
               return obstacle(problem, device, kernel_named(kernel));
             });
  module.def("plan", [](const Problem& problem, const Device& device, const std::string& kernel) {
    return kernel.empty() ? make_plan(problem, device) : make_plan(problem, device, kernel_named(kernel));
  }, py::arg("problem"), py::arg("device"), py::arg("kernel") = "");
  module.def("weight_grad", &weight_grad, py::arg("plan"), py::kw_only(), py::arg("input"), py::arg("grad_output"),
             py::arg("filters"), py::arg("first_filter"), py::arg("scale"), py::arg("shift"), py::arg("result"),
             py::arg("workspace"), py::arg("counters"), py::arg("stream"));
  module.attr("TOOLKIT") = RWN_TOOLKIT;
  module.attr("COMPILER") = RWN_COMPILER;
  module.attr("ARCHITECTURES") = RWN_ARCHS;
}

}  // namespace rwn
