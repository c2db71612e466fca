// Launching: shared memory above 48 KiB, cooperation of the splits, TMA's view of X, errors in words.
#include "launch.h"

#include <cudaTypedefs.h>

#include <sstream>
#include <stdexcept>

#include "kernels.h"

namespace rwn {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  // The error has been told: it must not come up again at the next call of someone else.
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, index), "CUDA device " + std::to_string(index));
  return value;
}

// libcuda is not linked, so that the module loads without a driver: the driver is asked for its function.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder();

void encode_x_map(Task& task, const Plan& plan) {
  static_assert(sizeof(CUtensorMap) == sizeof(task.x_map) && alignof(CUtensorMap) <= 128);
  static const auto encode = tensor_map_encoder();
  const Problem& p = plan.problem;
  const auto type = p.type == Type::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(p.channels), cuuint64_t(p.batch) * p.height * p.width};
  const cuuint64_t strides[] = {cuuint64_t(p.x_stride[3]) * 2};  // bytes a pixel
  const cuuint32_t box[] = {64, kTilePixels}, steps[] = {1, 1};
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(task.x_map), type, 2, const_cast<void*>(task.x), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)) + " for " +
                             to_string(plan));
  }
}

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

Device device_of(int index) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "CUDA");
  Device device{};
  device.capability = attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                      attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.block_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.multiprocessor_memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  // Twice the clock (kHz) times the bus (bits): bytes a nanosecond, of which a copy reaches about nine tenths.
  device.bandwidth = 0.9 * 2e-6 * attribute(cudaDevAttrMemoryClockRate, index) *
                     attribute(cudaDevAttrGlobalMemoryBusWidth, index) / 8;
  device.kernels = kernels_built(device.capability);
  return device;
}

std::string to_string(const Plan& plan) {
  const Problem& p = plan.problem;
  const char* types[] = {"float32", "bfloat16", "float16"};
  std::ostringstream text;
  text << name_of(plan.kernel) << " kernel of width " << plan.width << ", " << plan.blocks << " blocks of "
       << plan.threads << " threads, " << plan.task.splits << " splits, " << plan.shared_memory
       << " bytes of shared memory, for " << p.learned << " filters " << p.kernel_h << "x" << p.kernel_w << ", input ("
       << p.batch << ", " << p.channels << ", " << p.height << ", " << p.width << ") " << types[int(p.type)];
  return text.str();
}

void launch(const Plan& plan, const Buffers& buffers, cudaStream_t stream) {
  Task task = plan.task;
  task.x = buffers.x, task.gradient = buffers.gradient;
  task.filters = buffers.filters, task.first_filter = buffers.first_filter;
  task.scale = buffers.scale, task.shift = buffers.shift;
  task.out = buffers.out, task.workspace = buffers.workspace, task.counters = buffers.counters;
  if (plan.kernel == Kernel::wgmma) encode_x_map(task, plan);

  const auto* function = reinterpret_cast<const void*>(function_of(plan));
  if (function == nullptr) throw std::runtime_error("this build does not hold the " + to_string(plan));
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory),
        to_string(plan));
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks / task.splits, task.splits);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_memory;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = task.splits > 1 ? 1 : 0;
  void* arguments[] = {&task};
  check(cudaLaunchKernelExC(&config, function, arguments), to_string(plan));
}

}  // namespace rwn
