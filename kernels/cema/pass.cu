// One pass of CEMA over time: the forward pass, or, with REVERSE, its transpose, which gives dx from dy.
//
// With the tables of kernels/README.md, for each channel and block of T steps:
//   forward   y = Toeplitz(k) x + Re(C h),     h <- A h + S x        in = S_t = p q^(T-1-t),  out = C_t = g q^(t+1)
//   REVERSE   dx = Toeplitz(k)^T dy + Re(S l), l <- A l + C dy       in = C_t,                out = S_t
// where l is the conjugate of the state's gradient and the blocks are walked from the last one to the first.
//
// A thread block owns kChannels channels, one warp each, and walks their tiles of 16 blocks in order of time for some
// batch rows and one segment. All threads move tiles between device and shared memory (cema/staging.cuh); each warp
// works on its own channel of a tile alone, in place. Two tiles' buffers alternate: between two barriers the block
// brings in tile i + 1, stores tile i - 1 and works on tile i. Half of the warps move data first and half compute
// first, so that both overlap; neighbouring warps run on different schedulers, so the halves are chosen by warp / 4.
// The loads of tile i + 2 are then in flight, in registers.
//
// In a warp, the rows of the matrix products are the 16 blocks: rows g and g + 8 (g = lane / 4) hold blocks 2g and
// 2g + 1 in walking order. A lane holds the states of orders 4 j + lane % 4 of its two blocks, real and imaginary part
// side by side in an accumulator, so the scan over blocks is arithmetic on registers with three shuffles up, and the
// states' bfloat16 terms are at once the left operand of the product with the out table.
//
// With SUMMARY it walks without an output: each segment leaves the state that it makes of a zero one (its conjugate in
// REVERSE, as everywhere inside).
//
// Precision: tables and states are split into kTerms bfloat16 terms, sums are float32. For bfloat16 activations the
// carried state joins the first block's and goes through the scan. For float32 ones it is a float64 number beside the
// scan and decays by A^16, made in float64, so that a slow decay does not gather the rounding of every tile.
#include "cema/pass.cuh"

struct Params {
  const char* x;
  char* y;                            // not with SUMMARY
  const Complex<Real>* coefficients;  // (D, kSlots, kOrders)
  const Real* lags;                   // (D, T)
  const Complex<float>* state_in;     // (B, D, N), null is zero
  Complex<float>* state_out;          // (B, D, N), null if not wanted
  Complex<float>* boundaries;         // (groups - 1, B, D, N): the states between groups of tiles; null if not wanted
  Complex<float>* summaries;          // (segments, B, D, N): what each segment leaves of a zero state
  long long x_row, y_row;             // elements from one batch row to the next
  int length;                         // steps, a multiple of T
  int batch, dim, order;
  int rows;                           // batch rows of a thread block
  int segments;                       // parts of the time axis that are walked at once
  int segment_tiles;
};

constexpr int kTilesPerGroup = 2;  // tiles between two states that are kept for the backward pass

// Where this thread works: its warp's channel, and its two blocks of a tile.
struct Place {
  int warp, lane, g, c;
  int first_channel, channels;  // of the thread block
  int channel, known;           // of the warp; the nearest one that there is
  bool real;                    // the other warps work on zeros
  int block0, block1;
  __device__ __forceinline__ explicit Place(const Params& p) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    first_channel = blockIdx.x * kChannels, channels = min(kChannels, p.dim - first_channel);
    channel = first_channel + warp, known = min(channel, p.dim - 1);
    real = channel < p.dim;
    block0 = kReverse ? 15 - 2 * g : 2 * g, block1 = kReverse ? 14 - 2 * g : 2 * g + 1;
  }
};

// A tile of the walk: batch row and number in the row, in walking order.
struct Cursor {
  int row, walked;
  __device__ __forceinline__ void advance(int tiles) {
    if (++walked == tiles) {
      walked = 0;
      ++row;
    }
  }
};

// The tiles that the thread block walks, and their way between device memory and registers.
struct Walk {
  const Params& p;
  const Place& at;
  int all_tiles;            // of a row
  int segment, first_tile;  // in walking order
  int tiles;                // of the segment
  int first_row, total;     // tiles of all rows

  __device__ __forceinline__ Walk(const Params& p, const Place& at) : p(p), at(at) {
    all_tiles = (p.length + kTileSteps - 1) / kTileSteps;
    segment = blockIdx.z;
    first_tile = segment * p.segment_tiles;
    tiles = min(p.segment_tiles, all_tiles - first_tile);
    first_row = blockIdx.y * p.rows;
    total = min(p.rows, p.batch - first_row) * tiles;
  }
  // Where a tile of the walk lies in time.
  __device__ __forceinline__ int place(int walked) const {
    return kReverse ? all_tiles - 1 - (first_tile + walked) : first_tile + walked;
  }
  __device__ __forceinline__ int steps_of(int walked) const {
    return min(kTileSteps, p.length - place(walked) * kTileSteps);
  }
  __device__ __forceinline__ long long bytes_before(const Cursor& cursor, long long row) const {
    const long long bytes = kFloat32 ? 4 : 2;
    return (cursor.row * row + static_cast<long long>(place(cursor.walked)) * kTileSteps * p.dim + at.first_channel) *
           bytes;
  }
  __device__ __forceinline__ void fetch_tile(Move (&moves)[Staging<PassTile>::kMoves], const Cursor& cursor) const {
    fetch<PassTile>(moves, p.x + bytes_before(cursor, p.x_row), steps_of(cursor.walked), p.dim, at.channels);
  }
  __device__ __forceinline__ void store_tile(const unsigned* words, const Cursor& cursor) const {
    store<PassTile>(words, p.y + bytes_before(cursor, p.y_row), steps_of(cursor.walked), p.dim, at.channels);
  }
};

// Where the carried state of a row comes from and goes to. Every lane carries orders c, 4 + c ...; for bfloat16
// activations only lanes with g = 0 do.
struct StateRows {
  const Params& p;
  const Place& at;
  const Walk& walk;
  long long states_of_row, state_at;  // in a row: of order c, then 4 + c ...
  bool holds;

  __device__ __forceinline__ StateRows(const Params& p, const Place& at, const Walk& walk) : p(p), at(at), walk(walk) {
    states_of_row = static_cast<long long>(p.dim) * p.order;
    state_at = static_cast<long long>(at.known) * p.order + at.c;
    holds = kFloat32 || at.g == 0;
  }

  // Before the first tile of a row.
  __device__ __forceinline__ void start(Complex<Real> (&carry)[kStateTiles], int row) const {
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      const bool there = holds && at.real && 4 * j + at.c < p.order;
      const long long from = row * states_of_row + state_at + 4 * j;
      Complex<float> start = {0, 0};
      if (there && p.summaries && walk.segment > 0 && kWrites) {
        // The first segment's summary is its whole outgoing state. Every segment from there to here has the same
        // length, in either direction.
        const long long stride = p.batch * states_of_row;
        Complex<Real> sum = convert<Real>(p.summaries[from]);
        const Complex<Real> decay = Coefficients(p.coefficients, at.known, 4 * j + at.c)[kSegment];
#pragma unroll 1
        for (int s = 1; s < walk.segment; ++s)
          sum = multiply_add(decay, sum, convert<Real>(p.summaries[s * stride + from]));
        start = convert<float>(sum);
      } else if (there && p.state_in && walk.segment == 0) {
        start = p.state_in[from];
        if (kReverse) start.im = -start.im;
      }
      carry[j] = convert<Real>(start);
    }
  }

  // After the last tile of a row.
  __device__ __forceinline__ void finish(const Complex<Real> (&carry)[kStateTiles], int row) const {
    Complex<float>* to = kWrites ? (walk.segment == p.segments - 1 ? p.state_out : nullptr) : p.summaries;
    if (!to || at.g != 0 || !at.real) return;
    to += ((kWrites ? 0 : walk.segment * static_cast<long long>(p.batch)) + row) * states_of_row + state_at;
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      Complex<float> last = convert<float>(carry[j]);
      if (kReverse && kWrites) last.im = -last.im;
      if (4 * j + at.c < p.order) to[4 * j] = last;
    }
  }

  // Between two groups of tiles, for the backward pass.
  __device__ __forceinline__ void keep(const Complex<Real> (&carry)[kStateTiles], int row, int edge) const {
    if (at.g != 0 || !at.real) return;
    Complex<float>* to = p.boundaries + (static_cast<long long>(edge) * p.batch + row) * states_of_row + state_at;
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j)
      if (4 * j + at.c < p.order) to[4 * j] = convert<float>(carry[j]);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) cema_pass(const __grid_constant__ Params p) {
  const Place at(p);
  // Shared memory: two tiles, the scan's powers, and the table of outputs if registers are short of room.
  unsigned* buffers = reinterpret_cast<unsigned*>(shared_memory());
  unsigned char* after_buffers = shared_memory() + 2 * 4 * kTileWords;
  ScanPowers* powers = reinterpret_cast<ScanPowers*>(after_buffers) + at.warp * kOrders;

  InTable in;
  OutTable<kOutShared> out(after_buffers + kChannels * kOrders * sizeof(ScanPowers), at.warp, at.lane);
  ToeplitzTable toeplitz = {};
  in.load(p.coefficients, at.known, at.g, at.c);
  load_out_table(out, p.coefficients, at.known, at.g, at.c);
  toeplitz.load(p.lags, at.known, at.g, at.c);
  for (int n = at.lane; n < kOrders; n += 32) load_powers(powers[n], Coefficients(p.coefficients, at.known, n));
  sync_warp();

  const Walk walk(p, at);
  const StateRows rows(p, at, walk);
  Complex<Real> carry[kStateTiles];
  Move moves[Staging<PassTile>::kMoves];
  Cursor coming = {walk.first_row, 0}, current = coming, leaving = coming;
  walk.fetch_tile(moves, coming);
  to_shared<PassTile>(moves, buffers);
  coming.advance(walk.tiles);
  if (walk.total > 1) walk.fetch_tile(moves, coming);
  for (int i = 0; i <= walk.total; ++i) {
    sync_block();  // tile i is in shared memory, and so are the results of tile i - 1
    unsigned* buffer = buffers + i % 2 * kTileWords;
    unsigned* other = buffers + (i + 1) % 2 * kTileWords;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == at.warp / 4 % 2) {
        // A thread writes the words that it has just read, so the buffer passes from one tile to the next without a
        // barrier.
        if (i > 0) {
          if (kWrites) walk.store_tile(other, leaving);
          leaving.advance(walk.tiles);
        }
        if (i + 1 < walk.total) {
          to_shared<PassTile>(moves, other);
          coming.advance(walk.tiles);
          if (i + 2 < walk.total) walk.fetch_tile(moves, coming);
        }
        continue;
      }
      if (i == walk.total) continue;
      const int here = walk.place(current.walked), blocks = walk.steps_of(current.walked) / kBlock;
      unsigned* words = buffer + at.warp * PassTile::kChannelWords;
      if (current.walked == 0) rows.start(carry, current.row);
      const int later = kReverse ? here + 1 : here;  // the first tile after the edge that the walk stands at
      if (kWrites && p.boundaries && later % kTilesPerGroup == 0 && later > 0 && later < walk.all_tiles)
        rows.keep(carry, current.row, later / kTilesPerGroup - 1);

      unsigned x[kTimeSteps][kPlanes][4], states[kStateSteps][kTerms][4];
      float u[kStateTiles][4], y[kOutTiles][4];
      read_blocks(x, words, at.block0, at.block1, at.c);
      state_product(u, x, in);
      toeplitz_product(y, x, toeplitz);
      const int missing = PassTile::kBlocks - blocks;
      if (kReverse && missing > 0) hand_on_carry(u, carry, missing, at.g, at.c);
      scan_blocks(states, u, carry, powers, blocks, rows.holds, at.lane);
      if (kWrites) {
        add_states_to_output(y, states, out);
        write_blocks(words, y, at.block0, at.block1, at.c);
      }
      if (current.walked == walk.tiles - 1) rows.finish(carry, current.row);
      current.advance(walk.tiles);
    }
  }
}
