// TimestepNorm, forward: y, the running mean and 1/std of every step, and the state after the last one.
//
// Read timestep_norm/common.cuh first. Per tile: (1) the group mean of each step, then mean and square of the
// deviations from it, in registers, by shuffles within a team; (2) OverTime: sums up to each step; (3) running
// statistics, one step per lane; (4) y from the registers of (1). The next tile is loaded before (1) of this one. There
// is one barrier of the block a tile, and a second one where several blocks share a sequence, for their sums.
//
// Precision: products and sums within a step are float32 about the step's own mean, whose rounding the mean of the
// deviations corrects; everything over time is float64 about `pivot`, a mean close to the data's, so that
// E[m^2] - E[m]^2 does not cancel when the data lies far from 0. y is computed in float32 and rounded once.
//
// Memory: an activation is read once and written once, and 8 bytes a step and group are written for the backward pass.
#include "timestep_norm/common.cuh"

struct Params {
  const unsigned char* x;  // (B, L, D)
  unsigned char* y;
  const float* weight;  // (D,)
  const float* bias;
  const long long* count;     // (B,)
  const float* mean;          // (B, G)
  const float* var;           // (B, G)
  const unsigned char* mask;  // (B, L), 1 at padding; only if kMasked
  const int* steps;           // (B, L), unmasked steps up to and including each; only if kMasked
  long long* last_count;
  float* last_mean;
  float* last_var;
  float* step_mean;  // (B, L, G), in memory with the strides below; minus the carried mean, if there is one
  float* step_rstd;
  Sums* totals;     // (B * G, tiles)
  unsigned* flags;  // (B * G, tiles), zeros
  long long length;
  int step_stride, group_stride, groups, blocks;
  double eps;
};

// A mean close to the data's, the same for all blocks: the state's, else that of the first step that is not masked.
__device__ __forceinline__ float pivot_of(const Params& p, const Sequence& at, const unsigned char* rows,
                                          long long step_bytes, int lane) {
  if (p.count[at.row] > 0) return p.mean[at.row * p.groups + at.group];
  int first = 0;
  if constexpr (kMasked) {
    // The first step whose count is not 0, found 32 at a time.
    const int* steps = p.steps + at.row * p.length;
    int low = 0, width = static_cast<int>(p.length);
    while (width > 0) {
      const int stride = (width + 31) / 32, i = low + (lane + 1) * stride - 1;
      int found = i < p.length && steps[i] == 0 ? 0 : 1;  // from some lane on all are 1
#pragma unroll
      for (int mask = 16; mask; mask /= 2) found += shuffle_xor(found, mask);
      low += (32 - found) * stride;
      width = found ? stride - 1 : 0;
    }
    first = low;
    if (first >= p.length) return 0.0f;
  }
  float sum = 0;
  for (int f = lane; f < kFeatures; f += 32) sum += load_one(rows + first * step_bytes, f);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum / kFeatures;
}

// What the owner of a step (member i of a team) needs to know of it before its tile begins. Filled in through a
// reference: returned by value, it costs some variants registers.
struct Step {
  bool valid;   // the lane has a step, and it is not masked
  int counted;  // unmasked steps of x up to and including it
};
__device__ __forceinline__ void load_step(Step& step, const Params& p, const Sequence& at, const Walk& walk, int t) {
  step.valid = walk.owns(t) && !(kMasked && p.mask[at.row * p.length + t]);
  step.counted = kMasked && t < walk.length ? p.steps[at.row * p.length + t] : t + 1;
}

// The state that the sequence starts from.
struct Start {
  double pivot;
  long long count;
  double squares;  // sum of the centred squares of all steps counted
};
__device__ __forceinline__ Start load_start(const Params& p, const Sequence& at, long long sequence, const Walk& walk,
                                            int lane) {
  Start start;
  start.pivot = pivot_of(p, at, p.x + walk.start, walk.step_bytes, lane);
  start.count = p.count[at.row];
  start.squares = start.count > 0 ? static_cast<double>(start.count) * p.var[sequence] : 0.0;
  return start;
}

// Gain and bias of each feature, to shared memory.
__device__ __forceinline__ void load_parameters(float* shared_gain, float* shared_bias, const float* weight,
                                                const float* bias) {
  for (int f = threadIdx.x; f < kPadded; f += kThreads) {
    shared_gain[f] = f < kFeatures ? weight[f] + 1.0f : 0.0f;
    shared_bias[f] = f < kFeatures ? bias[f] : 0.0f;
  }
}

// (1) The group mean of each of the team's steps. Returns that of the lane's own step.
__device__ __forceinline__ float step_means(float (&centre)[kSteps], const Tile& x) {
#pragma unroll
  for (int i = 0; i < kSteps; i++) centre[i] = 0;
#pragma unroll kUnrolledChunks
  for (int c = 0; c < kChunks; c++)
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      float f[kVector];
      unpack(x.get(i, c), f);
#pragma unroll
      for (int e = 0; e < kVector; e++) centre[i] += f[e];
    }
  float mine = 0;
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    centre[i] = sum_team(centre[i]) * (1.0f / kFeatures);
    choose(mine, i == x.place.member, centre[i]);
  }
  return mine;
}

// (1) The sums of the deviations from the mean and of their squares, for the lane's own step.
__device__ __forceinline__ void deviations(float& my_off, float& my_square, const float (&centre)[kSteps],
                                           const Tile& x) {
  float off[kSteps], square[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; i++) off[i] = square[i] = 0;
#pragma unroll kUnrolledChunks
  for (int c = 0; c < kChunks; c++)
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      float f[kVector];
      unpack(x.get(i, c), f);
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        const float d = x.place.has(c) ? f[e] - centre[i] : 0.0f;
        off[i] += d;
        square[i] = fmaf(d, d, square[i]);
      }
    }
  my_off = my_square = 0;
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    choose(my_off, i == x.place.member, sum_team(off[i]));
    choose(my_square, i == x.place.member, sum_team(square[i]));
  }
}

// (2) What the lane's own step adds to the sums over time about the pivot.
__device__ __forceinline__ Sums sums_of_step(const Step& step, const Start& before, float centre, float off,
                                             float square) {
  Sums sums = no_sums();
  if (step.valid) {
    const double d = off * (1.0 / kFeatures);
    sums.first = (static_cast<double>(centre) - before.pivot) + d;
    // E (x - pivot)^2 = E (x - mu)^2 + (mu - pivot)^2; `square` is about centre = mu - d.
    sums.second = (square * (1.0 / kFeatures) - d * d) + sums.first * sums.first;
  }
  return sums;
}

// (3) The running statistics after a step, from the sums up to it.
struct Running {
  long long n;
  double mean, var, rstd;  // mean: minus the pivot
  __device__ __forceinline__ Running(const Start& before, const Step& step, const Sums& sums, double eps) {
    n = before.count + step.counted;
    const double share = 1.0 / static_cast<double>(n > 0 ? n : 1);
    mean = sums.first * share;
    var = (before.squares + sums.second) * share - mean * mean;
    var = var < 0 ? 0.0 : var;  // and NaN stays
    const double wide = var + eps;
    rstd = rsqrtf(static_cast<float>(wide));
    rstd = rstd * (1.5 - 0.5 * wide * rstd * rstd);  // to the last bit of float32
  }
};

// (3) Saved for the backward pass: the mean minus the carried one, which is the pivot if there is one.
__device__ __forceinline__ void save_step(const Params& p, long long i, const Start& before, const Running& now,
                                          float mean) {
  p.step_mean[i] = before.count > 0 ? static_cast<float>(now.mean) : mean;
  p.step_rstd[i] = static_cast<float>(now.rstd);
}

// (3) The state after the last step. A row that is all padding keeps the state it started from.
__device__ __forceinline__ void leave_state(const Params& p, const Sequence& at, long long sequence, const Step& step,
                                            const Running& now, float mean) {
  const bool touched = step.counted > 0;
  if (at.group == 0) p.last_count[at.row] = now.n;
  p.last_mean[sequence] = touched ? mean : p.mean[sequence];
  p.last_var[sequence] = touched ? static_cast<float>(now.var) : p.var[sequence];
}

// (4) y, from the running mean and 1/std of the step that each lane owns.
__device__ __forceinline__ void write_output(unsigned char* y, const Tile& x, const float* shared_gain,
                                             const float* shared_bias, float mean, float rstd) {
  const Place& place = x.place;
  float means[kSteps], rstds[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    means[i] = shuffle(mean, place.team_lane + i);
    rstds[i] = shuffle(rstd, place.team_lane + i);
  }
#pragma unroll kUnrolledChunks
  for (int c = 0; c < kChunks; c++) {
    float gain[kVector], shift[kVector];
    read_parameters(shared_gain + place.feature(c), gain);
    read_parameters(shared_bias + place.feature(c), shift);
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      float f[kVector];
      unpack(x.get(i, c), f);
#pragma unroll
      for (int e = 0; e < kVector; e++) f[e] = fmaf((f[e] - means[i]) * rstds[i], gain[e], shift[e]);
      x.put(y, i, c, kMasked && rstds[i] < 0 ? no_vector() : pack(f));
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    timestep_norm_forward(const __grid_constant__ Params p) {
  const Place place;
  const Sequence at(p.groups, p.blocks);
  const long long sequence = at.row * p.groups + at.group;
  const long long step_bytes = static_cast<long long>(p.groups) * (kFeatures * kActivationBytes);
  const long long start = at.row * p.length * step_bytes + at.group * (kFeatures * kActivationBytes);
  const Walk walk(place, p.length, start, step_bytes);
  const float* weight = p.weight + static_cast<long long>(at.group) * kFeatures;
  const float* bias = p.bias + static_cast<long long>(at.group) * kFeatures;
  // The first step's place among the saved numbers.
  const long long saved = at.row * p.length * p.groups + static_cast<long long>(at.group) * p.group_stride;

  Rows next;
  next.load(p.x, walk.span_of(at.block), place, step_bytes);
  Step next_step;
  load_step(next_step, p, at, walk, walk.own_step(at.block));
  const Start before = load_start(p, at, sequence, walk, place.lane);

  // Gain and bias, for each feature; the barrier before their first use is that of OverTime.
  Sums* shared_sums = reinterpret_cast<Sums*>(shared_memory());
  float* shared_gain = reinterpret_cast<float*>(shared_sums + OverTime::kSharedSums);  // [kPadded]
  float* shared_bias = shared_gain + kPadded;
  load_parameters(shared_gain, shared_bias, weight, bias);

  OverTime time(p.totals + sequence * walk.tiles, p.flags + sequence * walk.tiles, p.blocks, shared_sums);
  for (int tile = at.block; tile < walk.tiles; tile += p.blocks) {
    const Rows rows = next;
    const Span span = walk.span_of(tile);
    const Step step = next_step;
    const int t = walk.own_step(tile);
    if (tile + p.blocks < walk.tiles) {
      next.load(p.x, walk.span_of(tile + p.blocks), place, step_bytes);
      load_step(next_step, p, at, walk, walk.own_step(tile + p.blocks));
    }

    const Tile x = {rows, p.x, span, place, step_bytes};
    float centre[kSteps], my_off, my_square;
    const float my_centre = step_means(centre, x);
    deviations(my_off, my_square, centre, x);
    Sums sums = sums_of_step(step, before, my_centre, my_off, my_square);
    sums = time.add(sums, place, tile);

    float mean = 0, rstd = -1.0f;  // -1 says masked
    if (walk.owns(t)) {
      const Running now(before, step, sums, p.eps);
      mean = static_cast<float>(now.mean + before.pivot);
      save_step(p, saved + static_cast<long long>(t) * p.step_stride, before, now, mean);
      if (step.valid) rstd = static_cast<float>(now.rstd);
      if (t == walk.length - 1) leave_state(p, at, sequence, step, now, mean);
    }
    write_output(p.y, x, shared_gain, shared_bias, mean, rstd);
  }
}
