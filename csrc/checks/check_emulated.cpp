// Runs every kernel's own source on the CPU, thread by thread, and compares with a loop nest. No GPU, no CUDA.
#include <cstdio>
#include <cstring>
#include <set>

#include "../device.h"
#include "../kernels.h"
#include "cases.h"

namespace rwn::checks {

// Few multiprocessors, so that small problems are split too; shared memory of the smallest chip that takes the kernel.
Device small_device(int multiprocessors) { return {90, multiprocessors, 99 * 1024, 200 * 1024, 4000}; }

std::vector<char> run(const Case& c, const Plan& plan, const Data& data, bool backwards,
                      std::vector<unsigned>& counters) {
  std::vector<char> out(data.out_elements * bytes_of(c.out_type) + 16, char(0xff));
  std::vector<float> workspace(plan.workspace, std::numeric_limits<float>::quiet_NaN());
  std::vector<char> x(data.x_bytes.size() + 16);
  char* x_aligned = x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16;
  memcpy(x_aligned, data.x_bytes.data(), data.x_bytes.size());
  Task task = plan.task;
  task.x = x_aligned, task.gradient = data.gradient_bytes.data(), task.out = out.data();
  task.filters = contiguous(c.learned) ? nullptr : c.learned.data(), task.first_filter = c.learned.front();
  task.scale = data.scale.data(), task.shift = data.shift.data();
  task.workspace = workspace.data(), task.counters = counters.data();
  const emulator::TensorMap map{reinterpret_cast<const uint16_t*>(x_aligned), c.channels, c.batch * c.height * c.width,
                                plan.problem.x_stride[3]};
  memcpy(task.x_map, &map, sizeof map);
  emulator::launch(function_of(plan), task, plan.blocks / task.splits, task.splits, plan.threads, plan.shared_memory,
                   backwards);
  for (int i = 0; i < 16; ++i) {
    if (out[out.size() - 1 - i] != char(0xff)) std::printf("  wrote past the end\n"), std::exit(1);
  }
  return out;
}

int main() {
  int passed = 0, failed = 0;
  std::set<std::string> used;
  for (const Case& c : small_cases()) {
    const Problem problem = problem_of(c);
    const Data data = make_data(c, problem, 1);
    for (const Kernel kernel : {Kernel::ffma, Kernel::mma, Kernel::wgmma, Kernel::depthwise}) {
      if (!obstacle(problem, small_device(1), kernel).empty()) continue;
      for (const int multiprocessors : {1, 5}) {
        const Plan plan = make_plan(problem, small_device(multiprocessors), kernel);
        if (multiprocessors > 1 && plan.task.splits == 1) continue;
        // Twice over the same counters, in opposite orders: right, and the same bits.
        std::vector<unsigned> counters(plan.counters, 0);
        const auto forwards = run(c, plan, data, false, counters);
        const auto backwards = run(c, plan, data, true, counters);
        const int64_t wrong = count_wrong(c, data, forwards);
        const bool same = forwards == backwards;
        used.insert(std::string(name_of(kernel)) + " " + std::to_string(plan.width));
        (wrong == 0 && same ? passed : failed) += 1;
        if (wrong || !same) {
          std::printf("FAILED %s: %s, width %d, %d splits: %lld wrong%s\n", name_of(kernel), to_string(c).c_str(),
                      plan.width, plan.task.splits, static_cast<long long>(wrong), same ? "" : ", order matters");
        }
      }
    }
  }
  for (const auto& name : used) std::printf("%s, ", name.c_str());
  std::printf("\n%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

}  // namespace rwn::checks

int main() { return rwn::checks::main(); }
