// TimestepNorm, backward: dx, the gradient of the carried mean and variance, and each block's share of dweight and
// dbias.
//
// Read timestep_norm/common.cuh first. Steps are counted from the end: u = length - 1 - t. With s = dy gain, xhat = (x - m) r:
//   dm = -r sum s,  dv = -r^2/2 sum s xhat  over a step's features,
//   P = sum (dm - 2 (m - pivot) dv) / n,  R = sum dv / n  over the step and all later ones,
//   dx = s r + (P + 2 R (m - pivot)) / F + (2 R / F) (x - m).
// (The group mean of the step cancels between d mu and d s2.) Per tile: (1) the two sums of each step by shuffles, and
// the tile's part of dweight and dbias, which goes to the thread's own float64 numbers in shared memory; (2) OverTime:
// P and R; (3) dx from the registers of (1). The next tile is loaded before (1) of this one. After the last tile the
// block adds what its threads have of dweight and dbias, in a fixed order; timestep_norm_parameters adds the blocks'.
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

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    timestep_norm_backward(const __grid_constant__ Params p) {
  const Place place;
  const Sequence at(p.groups, p.blocks);
  const int length = static_cast<int>(p.length), tiles = (length + kTileSteps - 1) / kTileSteps;
  const long long sequence = at.row * p.groups + at.group;
  const long long dim = static_cast<long long>(p.groups) * kFeatures;
  const long long step_bytes = -dim * kActivationBytes;  // towards the start of time
  const long long last = (at.row + 1) * p.length - 1;    // the last step of the row
  const long long offset = last * dim * kActivationBytes + at.group * (kFeatures * kActivationBytes);
  const float* weight = p.weight + static_cast<long long>(at.group) * kFeatures;

  // The last step's place among the saved numbers.
  const long long saved = at.row * p.length * p.groups + (p.length - 1) * p.step_stride +
                          static_cast<long long>(at.group) * p.group_stride;

  constexpr int kSlots = kVector * kChunks;
  Sums* shared_sums = reinterpret_cast<Sums*>(shared_memory());
  Sums* parts = shared_sums + OverTime::kSharedSums;                        // [kSlots][kThreads], of dweight and dbias
  float* shared_gain = reinterpret_cast<float*>(parts + kSlots * kThreads);  // [kPadded]
  for (int f = threadIdx.x; f < kPadded; f += kThreads)
    shared_gain[f] = f < kFeatures ? weight[f] + 1.0f : 0.0f;
  Sums* of_thread = parts + threadIdx.x;
  for (int i = 0; i < kSlots; i++) of_thread[i * kThreads] = no_sums();

  // What the owner of a step (member i of a team) needs to know of it.
  struct Step {
    float mean, rstd;  // rstd -1 says masked
    int counted;       // only if kMasked
  };
  const auto load_step = [&](int u) {
    Step s;
    s.mean = 0;
    s.rstd = -1.0f;
    s.counted = 0;
    if (place.member < kSteps && u < length) {
      const long long i = last - u;
      s.counted = kMasked ? p.steps[i] : 0;
      if (!(kMasked && p.mask[i])) {
        const long long at_step = saved - static_cast<long long>(u) * p.step_stride;
        s.mean = __ldg(p.step_mean + at_step);
        s.rstd = __ldg(p.step_rstd + at_step);
      }
    }
    return s;
  };
  const auto team_start = [&](int tile) { return tile * kTileSteps + place.first_step(); };
  const auto span_of = [&](int tile) {
    Span span;
    const int u = team_start(tile);
    span.offset = offset + u * step_bytes + place.member * kVectorBytes;
    span.count = length - u;
    return span;
  };

  Rows next_x, next_dy;
  next_x.load(p.x, span_of(at.block), place, step_bytes);
  next_dy.load(p.dy, span_of(at.block), place, step_bytes);
  Step next_step = load_step(team_start(at.block) + place.member);

  const long long count = p.count[at.row];
  // A row of padding hands its state through. (What is needed once is read when it is: registers are scarce.)
  const auto touched = [&] { return !kMasked || p.steps[last] > 0; };
  const auto at_last = [&](const float* gradient) { return gradient ? gradient[sequence] : 0.0f; };
  // The saved means are relative to the carried one, if there is one, and so exact where both are large.
  const float base = count > 0 ? p.mean[sequence] : 0.0f, pivot = p.step_mean[saved];

  OverTime time(p.totals + sequence * tiles, p.flags + sequence * tiles, p.blocks, shared_sums);
  if (touched()) {  // the state after the last step, whose mean is the pivot
    const double n = static_cast<double>(count + (kMasked ? p.steps[last] : length));
    time.carry.first = at_last(p.dmean_last) / n;
    time.carry.second = at_last(p.dvar_last) / n;
  }

  sync_block();
  for (int tile = at.block; tile < tiles; tile += p.blocks) {
    const Rows x = next_x, dy = next_dy;
    const Step step = next_step;
    const Span span = span_of(tile);
    const int mine = team_start(tile) + place.member;
    if (tile + p.blocks < tiles) {
      next_x.load(p.x, span_of(tile + p.blocks), place, step_bytes);
      next_dy.load(p.dy, span_of(tile + p.blocks), place, step_bytes);
      next_step = load_step(team_start(tile + p.blocks) + place.member);
    }
    const float mean = base + step.mean;  // rounded
    float means[kSteps], rstds[kSteps], sum[kSteps], product[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      means[i] = shuffle(mean, place.team_lane + i);
      rstds[i] = shuffle(step.rstd, place.team_lane + i);
      sum[i] = product[i] = 0;
    }
    // Padding may hold NaN; there both count as 0.
    const auto unpack_valid = [&](const Rows& rows, const unsigned char* tensor, int i, int chunk, float(&f)[kVector]) {
      unpack(kMasked && rstds[i] < 0 ? no_vector() : rows.get(tensor, span, place, i, chunk, step_bytes), f);
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
        unpack_valid(x, p.x, i, c, fx);
        unpack_valid(dy, p.dy, i, c, fdy);
#pragma unroll
        for (int e = 0; e < kVector; e++) {
          const float xhat = (fx[e] - means[i]) * rstds[i], s = fdy[e] * gain[e];
          sum[i] += s;
          product[i] = fmaf(s, xhat, product[i]);
          of_weight[e] = fmaf(fdy[e], xhat, of_weight[e]);
          of_bias[e] += fdy[e];
        }
      }
      // Nothing is exchanged: this keeps the compiler from loading what follows before there are registers for it.
      sync_warp();
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        Sums more;
        more.first = of_weight[e];
        more.second = of_bias[e];
        Sums& mine_of_it = of_thread[(c * kVector + e) * kThreads];
        mine_of_it = mine_of_it + more;
      }
    }
    float my_sum = 0, my_product = 0;
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      choose(my_sum, i == place.member, sum_team(sum[i]));
      choose(my_product, i == place.member, sum_team(product[i]));
    }

    Sums sums = no_sums();
    const double away = static_cast<double>(step.mean) - pivot;
    if (step.rstd >= 0 || step.rstd != step.rstd) {
      const double share = 1.0 / static_cast<double>(count + (kMasked ? step.counted : length - mine)), r = step.rstd;
      // The deviations were taken from the rounded mean; this is what that cost their sum.
      const double rounding = static_cast<double>(base + step.mean) - base - step.mean;
      const double dv = -0.5 * r * r * (my_product + rounding * r * my_sum);
      sums.first = (-r * my_sum - 2.0 * away * dv) * share;
      sums.second = dv * share;
    }
    sums = time.add(sums, place, tile);

    if (place.member < kSteps && mine == length - 1) {  // the first step in time
      const bool through = !touched();
      double dmean = through ? at_last(p.dmean_last) : 0.0, dvar = through ? at_last(p.dvar_last) : 0.0;
      if (!through && count > 0) {
        dmean = static_cast<double>(count) * (sums.first - 2.0 * sums.second * pivot);  // its own mean is 0 from itself
        dvar = static_cast<double>(count) * sums.second;
      }
      p.dmean[sequence] = static_cast<float>(dmean);
      p.dvar[sequence] = static_cast<float>(dvar);
    }
    const float level = static_cast<float>((sums.first + 2.0 * sums.second * away) * (1.0 / kFeatures));
    const float slope = static_cast<float>(sums.second * (2.0 / kFeatures));
    float levels[kSteps], slopes[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      // Asked for again: else the compiler keeps what phase (1) made of them, in registers that are not there.
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
        unpack(x.get(p.x, span, place, i, c, step_bytes), fx);
        unpack(dy.get(p.dy, span, place, i, c, step_bytes), fdy);
#pragma unroll
        for (int e = 0; e < kVector; e++)
          fx[e] = fmaf(fdy[e] * gain[e], rstds[i], fmaf(slopes[i], fx[e] - means[i], levels[i]));
        const Vector v = kMasked && rstds[i] < 0 ? no_vector() : pack(fx);
        if (span.has(place, i, c)) store_vector(p.dx + span.at(i, c, step_bytes), v);
      }
    }
  }

  sync_block();
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
