// Runs every kernel on a GPU against a host reference in float64. No torch.
//
//   csrc/checks/run                      builds this for the GPU at hand, runs it, and again under compute-sanitizer
//   check_kernels [--quick | --list N]   --quick: small problems only, for compute-sanitizer; --list: no device needed,
//                                        prints what is run on compute capability N / 10
//
// A launch must be right (the data are whole numbers, so results are compared with ==), leave what stands behind its
// result alone, and give the same bits when repeated. Memory is NaN before it. All of it runs on a stream that does not
// wait for others. One line a family is printed; the exit status is 0, 1 where something is wrong, 77 without a device.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "../launch.h"
#include "sweep.h"

namespace rwn::checks {
namespace {

constexpr int kNoDevice = 77, kGuardBytes = 64;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class Memory {  // of the device, NaN at first
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&address_, std::max<size_t>(bytes, 1)), "cudaMalloc");
    fill(0xff);
  }
  explicit Memory(const void* source, size_t bytes) : Memory(bytes) {
    check(cudaMemcpy(address_, source, bytes, cudaMemcpyHostToDevice), "to the device");
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(address_); }

  void fill(int byte) {
    check(cudaMemset(address_, byte, bytes_), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaMemset");
  }
  std::vector<char> read() const {
    std::vector<char> host(bytes_);
    check(cudaMemcpy(host.data(), address_, bytes_, cudaMemcpyDeviceToHost), "from the device");
    return host;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(address_);
  }
  size_t size() const { return bytes_; }

 private:
  void* address_ = nullptr;
  size_t bytes_;
};

struct Stream {
  cudaStream_t handle;
  Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "stream"); }
  ~Stream() { cudaStreamDestroy(handle); }
  void wait() { check(cudaStreamSynchronize(handle), "kernel"); }
};

// One launch with its operands on the device.
struct Operands {
  const Trial& trial;
  const Data& data;
  Memory x, gradient, filters, scale, shift, out, workspace, counters;

  Operands(const Trial& trial, const Data& data)
      : trial(trial),
        data(data),
        x(data.x_bytes.data(), data.x_bytes.size()),
        gradient(data.gradient_bytes.data(), data.gradient_bytes.size()),
        filters(trial.problem.learned.data(), trial.problem.learned.size() * sizeof(int64_t)),
        scale(data.scale.data(), data.scale.size() * 4),
        shift(data.shift.data(), data.shift.size() * 4),
        out(data.out_elements * bytes_of(trial.problem.out_type) + kGuardBytes),
        workspace(trial.plan.workspace * 4),
        counters(trial.plan.counters * 4) {
    counters.fill(0);
  }

  Buffers buffers() const {
    const auto& learned = trial.problem.learned;
    return {x.as<void>(),      gradient.as<void>(), contiguous(learned) ? nullptr : filters.as<int64_t>(),
            learned.front(),   scale.as<float>(),   shift.as<float>(),
            out.as<void>(),    workspace.as<float>(), counters.as<unsigned>()};
  }

  void poison() {
    out.fill(0xff);
    workspace.fill(0xff);
  }

  // The result's bytes; throws what is wrong with it.
  std::vector<char> verified() const {
    const std::vector<char> bytes = out.read();
    if (const int64_t wrong = count_wrong(trial.problem, data, bytes)) {
      throw std::runtime_error(std::to_string(wrong) + " of " + std::to_string(data.out_elements) + " results wrong");
    }
    for (int i = 0; i < kGuardBytes; ++i) {
      if (bytes[bytes.size() - 1 - i] != char(0xff)) throw std::runtime_error("it wrote past the end of the result");
    }
    const std::vector<char> left = counters.read();
    for (size_t i = 0; i < left.size(); i += 4) {
      unsigned counter;
      memcpy(&counter, &left[i], 4);
      if (counter & 0x7fffffffu) throw std::runtime_error("a barrier's counter is left at " + std::to_string(counter));
    }
    return bytes;
  }
};

void expect_same(const std::vector<char>& first, const std::vector<char>& again, const char* what) {
  if (first != again) throw std::runtime_error(std::string(what) + " gives other bits");
}

std::vector<char> run_once(Operands& operands, Stream& stream) {
  operands.poison();
  launch(operands.trial.plan, operands.buffers(), stream.handle);
  stream.wait();
  return operands.verified();
}

void check_repeats(Operands& operands, Stream& stream, int repeats) {
  const std::vector<char> first = run_once(operands, stream);
  for (int i = 1; i < repeats; ++i) expect_same(first, run_once(operands, stream), "a repeated launch");
}

// Captured once, replayed over poisoned memory; the same bits as outside of a graph.
void check_graph(Operands& operands, Stream& stream) {
  const std::vector<char> eager = run_once(operands, stream);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeThreadLocal), "capture");
  launch(operands.trial.plan, operands.buffers(), stream.handle);
  check(cudaStreamEndCapture(stream.handle, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  for (int i = 0; i < 3; ++i) {
    operands.poison();
    check(cudaGraphLaunch(executable, stream.handle), "replay");
    stream.wait();
    expect_same(eager, operands.verified(), "a graph");
  }
  check(cudaGraphExecDestroy(executable), "graph");
  check(cudaGraphDestroy(graph), "graph");
}

// The input comes late on the stream: a kernel anywhere else would see NaN.
void check_stream(Operands& operands, Stream& stream) {
  operands.x.fill(0xff);
  operands.poison();
  check(cudaLaunchHostFunc(
            stream.handle, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }, nullptr),
        "host function");
  check(cudaMemcpyAsync(operands.x.as<void>(), operands.data.x_bytes.data(), operands.data.x_bytes.size(),
                        cudaMemcpyHostToDevice, stream.handle),
        "to the device");
  launch(operands.trial.plan, operands.buffers(), stream.handle);
  stream.wait();
  operands.verified();
}

// Refused launches are exceptions that name the problem, and leave nothing behind.
void check_errors(Operands& operands, Stream& stream) {
  const auto refused = [&](const Plan& plan, const Buffers& buffers, const char* word) {
    try {
      launch(plan, buffers, stream.handle);
    } catch (const std::runtime_error& error) {
      const std::string text = error.what();
      if (text.find(word) == std::string::npos || text.find("filters") == std::string::npos) {
        throw std::runtime_error("a refused launch says no more than: " + text);
      }
      check(cudaGetLastError(), "after a refused launch");
      return;
    }
    throw std::runtime_error(std::string("a launch that cannot be was not refused: ") + word);
  };
  Plan plan = operands.trial.plan;
  plan.shared_memory = 1 << 20;
  refused(plan, operands.buffers(), "bytes of shared memory");
  if (operands.trial.plan.task.splits > 1) {
    plan = operands.trial.plan;
    plan.task.splits = 60'000, plan.blocks = plan.task.splits * plan.task.channel_tiles * plan.task.column_tiles;
    refused(plan, operands.buffers(), "60000 splits");
  }
  if (operands.trial.plan.kernel == Kernel::wgmma) {
    Buffers buffers = operands.buffers();
    buffers.x = static_cast<const char*>(buffers.x) + 2;
    refused(operands.trial.plan, buffers, "cuTensorMapEncodeTiled");
  }
  run_once(operands, stream);
}

struct Tally {
  std::set<Function> functions;
  int passed = 0, failed = 0;
};
using Tallies = std::map<Kernel, Tally>;

void attempt(const Trial& trial, const std::string& what, Tallies& tallies,
             const std::function<void(Operands&)>& body) {
  Tally& tally = tallies[trial.plan.kernel];
  tally.functions.insert(function_of(trial.plan));
  try {
    const Data data = make_data(trial.problem, trial.plan.problem, 1);
    Operands operands(trial, data);
    body(operands);
    ++tally.passed;
  } catch (const std::exception& error) {
    ++tally.failed;
    std::printf("FAILED %s, %s\n  %s\n  %s\n", what.c_str(), to_string(trial.problem).c_str(),
                to_string(trial.plan).c_str(), error.what());
    // Some errors end the context: nothing after them means anything.
    if (const cudaError_t state = cudaDeviceSynchronize(); state != cudaSuccess) {
      std::printf("the device is lost: %s\n", cudaGetErrorString(state));
      std::exit(1);
    }
  }
}

std::vector<Trial> small_trials(const Device& device) {
  std::vector<Trial> trials;
  for (const Case& c : small_cases()) {
    // Few multiprocessors give few splits, of more than one tile each.
    for (const int multiprocessors : {device.multiprocessors, 5}) {
      Device smaller = device;
      smaller.multiprocessors = std::min(device.multiprocessors, multiprocessors);
      for (const Trial& trial : trials_of(c, smaller)) trials.push_back(trial);
    }
  }
  return trials;
}

int list(int capability) {
  const bool large = capability == 80 || capability >= 90;
  const Device device{capability, 132, (large ? 163 : capability < 80 ? 64 : 99) * 1024, 164 * 1024, 3000,
                      kernels_built(capability)};
  std::map<Kernel, int> counts;
  for (const Trial& trial : one_for_every_function(device, 2)) ++counts[trial.plan.kernel];
  for (const Kernel kernel : kKernels) std::printf("%s: %d instantiations\n", name_of(kernel), counts[kernel]);
  return 0;
}

int main(bool quick) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    std::printf("no CUDA device: %s\n", error == cudaSuccess ? "none is there" : cudaGetErrorString(error));
    return kNoDevice;
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "device 0");
  const Device device = device_of(0);
  std::printf("%s, compute capability %.1f, %d multiprocessors\n", properties.name, device.capability / 10.0,
              device.multiprocessors);

  Stream stream;
  Tallies tallies;
  const auto swept = one_for_every_function(device, quick ? 1 : 5);
  for (const Trial& trial : swept) {
    attempt(trial, "sweep", tallies, [&](Operands& operands) { check_repeats(operands, stream, quick ? 1 : 3); });
  }
  for (const Trial& trial : small_trials(device)) {
    attempt(trial, "corner", tallies, [&](Operands& operands) { check_repeats(operands, stream, quick ? 1 : 3); });
  }
  if (!quick) {
    for (const Trial& trial : swept) {
      attempt(trial, "graph", tallies, [&](Operands& operands) { check_graph(operands, stream); });
      attempt(trial, "stream", tallies, [&](Operands& operands) { check_stream(operands, stream); });
      attempt(trial, "errors", tallies, [&](Operands& operands) { check_errors(operands, stream); });
    }
    for (const Case& c : real_cases()) {
      for (const Trial& trial : trials_of(c, device)) {
        attempt(trial, "real size", tallies, [&](Operands& operands) { check_repeats(operands, stream, 10); });
      }
    }
  }
  int failed = 0;
  for (const Kernel kernel : kKernels) {
    const Tally& tally = tallies[kernel];
    if (tally.functions.empty()) {
      std::printf("%-9s not for this device\n", name_of(kernel));
      continue;
    }
    std::printf("%-9s %2d instantiations, %3d checks passed, %d failed\n", name_of(kernel),
                int(tally.functions.size()), tally.passed, tally.failed);
    failed += tally.failed;
  }
  std::printf("%s\n", failed ? "FAILED" : "all is right");
  return failed != 0;
}

}  // namespace
}  // namespace rwn::checks

int main(int count, char** arguments) {
  const std::string option = count > 1 ? arguments[1] : "";
  try {
    if (option == "--list" && count == 3) return rwn::checks::list(std::atoi(arguments[2]));
    if (count == 1 || (option == "--quick" && count == 2)) return rwn::checks::main(option == "--quick");
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  std::printf("usage: check_kernels [--quick | --list CAPABILITY]; csrc/checks/run builds and runs all\n");
  return 2;
}
