// TimestepNorm, backward: dx, the gradient of the carried mean and variance, and each block's share of dweight and
// dbias.
//
// Read timestep_norm/common.cuh first. Steps are counted from the end: u = length - 1 - t. With s = dy gain and
// xhat = (x - m) r:
//   dm = -r sum s,  dv = -r^2/2 sum s xhat  over a step's features,
//   P = sum (dm - 2 (m - pivot) dv) / n,  R = sum dv / n  over the step and all later ones,
//   dx = s r + (P + 2 R (m - pivot)) / F + (2 R / F) (x - m).
// (The group mean of the step cancels between d mu and d s2.) Per tile: (1) the two sums of each step by shuffles, and
// the tile's part of dweight and dbias, which goes to the thread's own float64 numbers in shared memory; (2) OverTime:
// P and R; (3) dx from the registers of (1). The next tile is loaded before (1) of this one. After the last tile the
// block adds its threads' parts of dweight and dbias, in a fixed order; timestep_norm_parameters adds the blocks'.
//
// Precision: float32 within a step, about the saved m; float64 over time, about `pivot`, the last step's m. Both are
// relative to the carried mean, if there is one.
//
// Memory: x and dy are read once, dx is written once, and 8 bytes a step and group are read.
#include "timestep_norm/common.cuh"

struct Params {
  const unsigned char* dy;  // (B, L, D)
  const unsigned char* x;
  unsigned char* dx;
  const float* weight;      // (D,)
  const float* dmean_last;  // (B, G), or null: zeros
  const float* dvar_last;
  const long long* count;     // (B,)
  const float* mean;          // (B, G)
  const unsigned char* mask;  // (B, L), 1 at padding; only if kMasked
  const int* steps;           // (B, L), unmasked steps up to and including each; only if kMasked
  const float* step_mean;     // (B, L, G), in memory with the strides below
  const float* step_rstd;
  float* dmean;
  float* dvar;
  float* partial;   // (2, B * blocks, D): dweight, dbias
  Sums* totals;     // (B * G, tiles)
  unsigned* flags;  // (B * G, tiles), zeros
  long long batch, length;
  int step_stride, group_stride, groups, blocks;
};

constexpr int kSlots = kVector * kChunks;  // features of a thread

// What the owner of a step (member i of a team) needs to know of it. load_step returns it by value: filled in through a
// reference, it makes some variants spill.
struct Step {
  float mean, rstd;  // rstd -1 says masked
  int counted;       // only if kMasked
};
__device__ __forceinline__ Step load_step(const Params& p, const Walk& walk, long long last, long long saved, int u) {
  Step s;
  s.mean = 0;
  s.rstd = -1.0f;
  s.counted = 0;
  if (walk.owns(u)) {
    const long long i = last - u;
    s.counted = kMasked ? p.steps[i] : 0;
    if (!(kMasked && p.mask[i])) {
      const long long at_step = saved - static_cast<long long>(u) * p.step_stride;
      s.mean = __ldg(p.step_mean + at_step);
      s.rstd = __ldg(p.step_rstd + at_step);
    }
  }
  return s;
}

// Whether the row has a step that is not masked. If it has none, its state is the one it started from.
__device__ __forceinline__ bool touched(const Params& p, long long last) { return !kMasked || p.steps[last] > 0; }

__device__ __forceinline__ float given(const float* gradient, long long sequence) {
  return gradient ? gradient[sequence] : 0.0f;
}

// What the gradient of the state after the last step, at step `count`, adds to P and R: that state's mean is the pivot.
__device__ __forceinline__ Sums carried_gradient(const Params& p, long long sequence, long long count) {
  const double n = static_cast<double>(count);
  Sums sums;
  sums.first = given(p.dmean_last, sequence) / n;
  sums.second = given(p.dvar_last, sequence) / n;
  return sums;
}

// The gain of each feature, to shared memory.
__device__ __forceinline__ void load_gain(float* shared_gain, const float* weight) {
  for (int f = threadIdx.x; f < kPadded; f += kThreads)
    shared_gain[f] = f < kFeatures ? weight[f] + 1.0f : 0.0f;
}

// (1) What a tile's chunk `c` adds to the thread's own part of dweight and dbias.
__device__ __forceinline__ void add_to_parts(Sums* of_thread, int c, const float (&of_weight)[kVector],
                                             const float (&of_bias)[kVector]) {
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    Sums more;
    more.first = of_weight[e];
    more.second = of_bias[e];
    Sums& mine = of_thread[(c * kVector + e) * kThreads];
    mine = mine + more;
  }
}

// (1) The sums of s and of s xhat over the features of the lane's own step; and the tile's part of dweight and dbias.
__device__ __forceinline__ void step_sums(float& my_sum, float& my_product, Sums* of_thread, const Tile& x,
                                          const Tile& dy, const float* shared_gain, float base, const Step& step) {
  const Place& place = x.place;
  const float mean = base + step.mean;  // rounded
  float means[kSteps], rstds[kSteps], sum[kSteps], product[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    means[i] = shuffle(mean, place.team_lane + i);
    rstds[i] = shuffle(step.rstd, place.team_lane + i);
    sum[i] = product[i] = 0;
  }
  // Padding may hold NaN; there both count as 0.
  const auto unpack_valid = [&](const Tile& tile, int i, int chunk, float(&f)[kVector]) {
    unpack(kMasked && rstds[i] < 0 ? no_vector() : tile.get(i, chunk), f);
  };
#pragma unroll kUnrolledChunks
  for (int c = 0; c < kChunks; c++) {
    float gain[kVector];
    read_parameters(shared_gain + place.feature(c), gain);
    float of_weight[kVector], of_bias[kVector];
#pragma unroll
    for (int e = 0; e < kVector; e++) of_weight[e] = of_bias[e] = 0;
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      float fx[kVector], fdy[kVector];
      unpack_valid(x, i, c, fx);
      unpack_valid(dy, i, c, fdy);
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        const float xhat = (fx[e] - means[i]) * rstds[i], s = fdy[e] * gain[e];
        sum[i] += s;
        product[i] = fmaf(s, xhat, product[i]);
        of_weight[e] = fmaf(fdy[e], xhat, of_weight[e]);
        of_bias[e] += fdy[e];
      }
    }
    // No data is exchanged. This keeps the compiler from loading the next chunk before registers are free for it.
    sync_warp();
    add_to_parts(of_thread, c, of_weight, of_bias);
  }
  my_sum = my_product = 0;
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    choose(my_sum, i == place.member, sum_team(sum[i]));
    choose(my_product, i == place.member, sum_team(product[i]));
  }
}

// (2) What the lane's own step adds to P and R; `n` steps are counted up to it, `away` is its mean minus the pivot.
__device__ __forceinline__ Sums sums_of_step(const Step& step, float sum, float product, float base, double away,
                                             long long n) {
  Sums sums = no_sums();
  if (step.rstd >= 0 || step.rstd != step.rstd) {
    const double share = 1.0 / static_cast<double>(n), r = step.rstd;
    // The deviations were taken from the rounded mean; this is what that cost their sum.
    const double rounding = static_cast<double>(base + step.mean) - base - step.mean;
    const double dv = -0.5 * r * r * (product + rounding * r * sum);
    sums.first = (-r * sum - 2.0 * away * dv) * share;
    sums.second = dv * share;
  }
  return sums;
}

// (2) The gradient of the state before the first step, from P and R there.
__device__ __forceinline__ void leave_state_gradient(const Params& p, long long sequence, long long last,
                                                     long long count, float pivot, const Sums& sums) {
  const bool through = !touched(p, last);
  double dmean = through ? given(p.dmean_last, sequence) : 0.0, dvar = through ? given(p.dvar_last, sequence) : 0.0;
  if (!through && count > 0) {
    dmean = static_cast<double>(count) * (sums.first - 2.0 * sums.second * pivot);  // its own mean is 0 from itself
    dvar = static_cast<double>(count) * sums.second;
  }
  p.dmean[sequence] = static_cast<float>(dmean);
  p.dvar[sequence] = static_cast<float>(dvar);
}

// (3) dx, from P and R of the step that each lane owns.
__device__ __forceinline__ void write_dx(unsigned char* dx, const Tile& x, const Tile& dy,
                                         const float* shared_gain, float base, const Step& step, double away,
                                         const Sums& sums) {
  const Place& place = x.place;
  const float level = static_cast<float>((sums.first + 2.0 * sums.second * away) * (1.0 / kFeatures));
  const float slope = static_cast<float>(sums.second * (2.0 / kFeatures));
  float means[kSteps], rstds[kSteps], levels[kSteps], slopes[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    // Shuffled a second time: otherwise the compiler keeps the results of phase (1), for which there are no registers.
    means[i] = shuffle(base + step.mean, place.team_lane + i);
    rstds[i] = shuffle(step.rstd, place.team_lane + i);
    levels[i] = shuffle(level, place.team_lane + i);
    slopes[i] = shuffle(slope, place.team_lane + i);
  }
#pragma unroll kUnrolledChunks
  for (int c = 0; c < kChunks; c++) {
    float gain[kVector];
    read_parameters(shared_gain + place.feature(c), gain);
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      float fx[kVector], fdy[kVector];
      unpack(x.get(i, c), fx);
      unpack(dy.get(i, c), fdy);
#pragma unroll
      for (int e = 0; e < kVector; e++)
        fx[e] = fmaf(fdy[e] * gain[e], rstds[i], fmaf(slopes[i], fx[e] - means[i], levels[i]));
      x.put(dx, i, c, kMasked && rstds[i] < 0 ? no_vector() : pack(fx));
    }
  }
}

// After the last tile: what the block's threads have of dweight and dbias, added up in a fixed order.
__device__ __forceinline__ void add_parameter_gradients(const Params& p, const Sequence& at, long long dim,
                                                        const Sums* parts) {
  float* partial = p.partial + (at.row * p.blocks + at.block) * dim + static_cast<long long>(at.group) * kFeatures;
#pragma unroll 1
  for (int f = threadIdx.x; f < kFeatures; f += kThreads) {
    const int vector = f / kVector;
    const int slot = (vector / kLanes * kVector + f % kVector) * kThreads + vector % kLanes;
    Sums sum = no_sums();
#pragma unroll 4
    for (int team = 0; team < kThreads / kLanes; team++) sum = sum + parts[slot + team * kLanes];
    partial[f] = static_cast<float>(sum.first);
    partial[f + p.batch * p.blocks * dim] = static_cast<float>(sum.second);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    timestep_norm_backward(const __grid_constant__ Params p) {
  const Place place;
  const Sequence at(p.groups, p.blocks);
  const long long sequence = at.row * p.groups + at.group;
  const long long dim = static_cast<long long>(p.groups) * kFeatures;
  const long long step_bytes = -dim * kActivationBytes;  // towards the start of time
  const long long last = (at.row + 1) * p.length - 1;    // the last step of the row
  const long long start = last * dim * kActivationBytes + at.group * (kFeatures * kActivationBytes);
  const Walk walk(place, p.length, start, step_bytes);
  const float* weight = p.weight + static_cast<long long>(at.group) * kFeatures;

  // The last step's place among the saved numbers.
  const long long saved = at.row * p.length * p.groups + (p.length - 1) * p.step_stride +
                          static_cast<long long>(at.group) * p.group_stride;

  Sums* shared_sums = reinterpret_cast<Sums*>(shared_memory());
  Sums* parts = shared_sums + OverTime::kSharedSums;                        // [kSlots][kThreads], of dweight and dbias
  float* shared_gain = reinterpret_cast<float*>(parts + kSlots * kThreads);  // [kPadded]
  load_gain(shared_gain, weight);
  Sums* of_thread = parts + threadIdx.x;
  for (int i = 0; i < kSlots; i++) of_thread[i * kThreads] = no_sums();

  Rows next_x, next_dy;
  next_x.load(p.x, walk.span_of(at.block), place, step_bytes);
  next_dy.load(p.dy, walk.span_of(at.block), place, step_bytes);
  Step next_step = load_step(p, walk, last, saved, walk.own_step(at.block));

  const long long count = p.count[at.row];
  // The saved means are relative to the carried one, if there is one, and so exact where both are large.
  const float base = count > 0 ? p.mean[sequence] : 0.0f, pivot = p.step_mean[saved];

  OverTime time(p.totals + sequence * walk.tiles, p.flags + sequence * walk.tiles, p.blocks, shared_sums);
  if (touched(p, last)) time.carry = carried_gradient(p, sequence, count + (kMasked ? p.steps[last] : walk.length));

  sync_block();
  for (int tile = at.block; tile < walk.tiles; tile += p.blocks) {
    const Rows x_rows = next_x, dy_rows = next_dy;
    const Step step = next_step;
    const Span span = walk.span_of(tile);
    const int u = walk.own_step(tile);
    if (tile + p.blocks < walk.tiles) {
      next_x.load(p.x, walk.span_of(tile + p.blocks), place, step_bytes);
      next_dy.load(p.dy, walk.span_of(tile + p.blocks), place, step_bytes);
      next_step = load_step(p, walk, last, saved, walk.own_step(tile + p.blocks));
    }
    const Tile x = {x_rows, p.x, span, place, step_bytes}, dy = {dy_rows, p.dy, span, place, step_bytes};
    float my_sum, my_product;
    step_sums(my_sum, my_product, of_thread, x, dy, shared_gain, base, step);

    const double away = static_cast<double>(step.mean) - pivot;
    const long long n = count + (kMasked ? step.counted : walk.length - u);
    Sums sums = sums_of_step(step, my_sum, my_product, base, away, n);
    sums = time.add(sums, place, tile);

    if (place.member < kSteps && u == walk.length - 1)  // the first step in time
      leave_state_gradient(p, sequence, last, count, pivot, sums);
    write_dx(p.dx, x, dy, shared_gain, base, step, away, sums);
  }

  sync_block();
  add_parameter_gradients(p, at, dim, parts);
}
