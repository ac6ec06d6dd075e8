// The sweeps alone, on rows that are prepared already.
#include "conr_launch.h"

#include <vector>

namespace {

conr::Args args_of(int type, const conr::Rows& rows, const conr::Settings& settings) {
  conr::Args args{};
  args.x_type = args.q_type = static_cast<conr::Type>(type);
  args.rows = rows;
  args.settings = settings;
  args.factor = 1;
  return args;
}

}  // namespace

extern "C" {

void simt_sweep_forward(int type, conr::Rows rows, conr::Settings settings, void* sums,
                        int32_t* counts, void* loss, void* stats) {
  conr::Args args = args_of(type, rows, settings);
  std::vector<int32_t> verdicts(static_cast<std::size_t>(conr::prepare_blocks(rows.n_keys)));
  args.verdicts = verdicts.data();
  args.sums = sums;
  args.counts = counts;
  args.loss = loss;
  args.stats = stats;
  conr::launch_forward(args, nullptr);
}

void simt_sweep_backward(int type, conr::Rows rows, conr::Settings settings, const void* coef,
                         void* G) {
  conr::Args args = args_of(type, rows, settings);
  args.coef = coef;
  args.G = G;
  conr::launch_sweeps_backward(args, nullptr);
}
}
