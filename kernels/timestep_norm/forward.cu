// TimestepNorm, forward: y, the running mean and 1/std of every step, and the state after the last one.
//
// Read timestep_norm/common.cuh first. Per tile: (1) the group mean of each step, then mean and square of the deviations from
// it, in registers, by shuffles within a team; (2) OverTime: sums up to each step; (3) running statistics, a step a
// lane; (4) y from the registers of (1). The next tile is loaded before (1) of this one. A block waits for itself once
// a tile, and with several blocks on a sequence once more, for their sums.
//
// Precision: products and sums within a step are float32 about the step's own mean, whose rounding the mean of the
// deviations takes out again; everything over time is float64 about `pivot`, a mean close to the data's, so that
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

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    timestep_norm_forward(const __grid_constant__ Params p) {
  const Place place;
  const Sequence at(p.groups, p.blocks);
  const int length = static_cast<int>(p.length), tiles = (length + kTileSteps - 1) / kTileSteps;
  const long long sequence = at.row * p.groups + at.group;
  const long long step_bytes = static_cast<long long>(p.groups) * (kFeatures * kActivationBytes);
  const long long offset = at.row * p.length * step_bytes + at.group * (kFeatures * kActivationBytes);
  const float* weight = p.weight + static_cast<long long>(at.group) * kFeatures;
  const float* bias = p.bias + static_cast<long long>(at.group) * kFeatures;

  const long long saved = at.row * p.length * p.groups + static_cast<long long>(at.group) * p.group_stride;

  // What the owner of a step (member i of a team) needs to know of it before its tile begins.
  const auto is_valid = [&](int t) {
    return place.member < kSteps && t < length && !(kMasked && p.mask[at.row * p.length + t]);
  };
  const auto count_at = [&](int t) { return kMasked && t < length ? p.steps[at.row * p.length + t] : t + 1; };
  const auto team_start = [&](int tile) { return tile * kTileSteps + place.first_step(); };
  const auto span_of = [&](int tile) {
    Span span;
    const int t = team_start(tile);
    span.offset = offset + t * step_bytes + place.member * kVectorBytes;
    span.count = length - t;
    return span;
  };

  Rows next;
  next.load(p.x, span_of(at.block), place, step_bytes);
  bool next_valid = is_valid(team_start(at.block) + place.member);
  int next_count = count_at(team_start(at.block) + place.member);

  const double pivot = pivot_of(p, at, p.x + offset, step_bytes, place.lane);
  const long long count = p.count[at.row];
  const double carried = count > 0 ? static_cast<double>(count) * p.var[sequence] : 0.0;

  // Gain and bias, for each feature; the barrier before their first use is that of OverTime.
  Sums* shared_sums = reinterpret_cast<Sums*>(shared_memory());
  float* shared_gain = reinterpret_cast<float*>(shared_sums + OverTime::kSharedSums);  // [kPadded]
  float* shared_bias = shared_gain + kPadded;
  for (int f = threadIdx.x; f < kPadded; f += kThreads) {
    shared_gain[f] = f < kFeatures ? weight[f] + 1.0f : 0.0f;
    shared_bias[f] = f < kFeatures ? bias[f] : 0.0f;
  }

  OverTime time;
  time.totals = p.totals + sequence * tiles;
  time.flags = p.flags + sequence * tiles;
  time.blocks = p.blocks;
  time.shared = shared_sums;
  time.carry = no_sums();
  time.parity = 0;

  for (int tile = at.block; tile < tiles; tile += p.blocks) {
    const Rows rows = next;
    const Span span = span_of(tile);
    const bool valid = next_valid;
    const int counted = next_count;
    const int start = team_start(tile), mine = start + place.member;
    if (tile + p.blocks < tiles) {
      next.load(p.x, span_of(tile + p.blocks), place, step_bytes);
      next_valid = is_valid(team_start(tile + p.blocks) + place.member);
      next_count = count_at(team_start(tile + p.blocks) + place.member);
    }

    float centre[kSteps], off[kSteps], square[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; i++) centre[i] = off[i] = square[i] = 0;
#pragma unroll kUnrolledChunks
    for (int c = 0; c < kChunks; c++)
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        float f[kVector];
        unpack(rows.get(p.x, span, place, i, c, step_bytes), f);
#pragma unroll
        for (int e = 0; e < kVector; e++) centre[i] += f[e];
      }
    float my_centre = 0, my_off = 0, my_square = 0;
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      centre[i] = sum_team(centre[i]) * (1.0f / kFeatures);
      choose(my_centre, i == place.member, centre[i]);
    }
#pragma unroll kUnrolledChunks
    for (int c = 0; c < kChunks; c++)
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        float f[kVector];
        unpack(rows.get(p.x, span, place, i, c, step_bytes), f);
#pragma unroll
        for (int e = 0; e < kVector; e++) {
          const float d = place.has(c) ? f[e] - centre[i] : 0.0f;
          off[i] += d;
          square[i] = fmaf(d, d, square[i]);
        }
      }
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      choose(my_off, i == place.member, sum_team(off[i]));
      choose(my_square, i == place.member, sum_team(square[i]));
    }

    Sums sums = no_sums();
    if (valid) {
      const double d = my_off * (1.0 / kFeatures);
      sums.first = (static_cast<double>(my_centre) - pivot) + d;
      // E (x - pivot)^2 = E (x - mu)^2 + (mu - pivot)^2; my_square is about centre = mu - d.
      sums.second = (my_square * (1.0 / kFeatures) - d * d) + sums.first * sums.first;
    }
    sums = time.add(sums, place, tile);

    float mean = 0, rstd = -1.0f;  // -1 says masked
    if (place.member < kSteps && mine < length) {
      const long long n = count + counted;
      const double share = 1.0 / static_cast<double>(n > 0 ? n : 1);
      const double m = sums.first * share;
      double v = (carried + sums.second) * share - m * m;
      v = v < 0 ? 0.0 : v;  // and NaN stays
      const double wide = v + p.eps;
      double r = rsqrtf(static_cast<float>(wide));
      r = r * (1.5 - 0.5 * wide * r * r);  // to the last bit of float32
      mean = static_cast<float>(m + pivot);
      const long long i = saved + static_cast<long long>(mine) * p.step_stride;
      p.step_mean[i] = count > 0 ? static_cast<float>(m) : mean;  // where count > 0 the pivot is the carried mean
      p.step_rstd[i] = static_cast<float>(r);
      if (valid) rstd = static_cast<float>(r);
      if (mine == length - 1) {
        const bool touched = counted > 0;  // else a row of padding hands its state through
        if (at.group == 0) p.last_count[at.row] = n;
        p.last_mean[sequence] = touched ? mean : p.mean[sequence];
        p.last_var[sequence] = touched ? static_cast<float>(v) : p.var[sequence];
      }
    }
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
        unpack(rows.get(p.x, span, place, i, c, step_bytes), f);
#pragma unroll
        for (int e = 0; e < kVector; e++) f[e] = fmaf((f[e] - means[i]) * rstds[i], gain[e], shift[e]);
        const Vector v = kMasked && rstds[i] < 0 ? no_vector() : pack(f);
        if (span.has(place, i, c)) store_vector(p.y + span.at(i, c, step_bytes), v);
      }
    }
  }
}
