// Linearized attention of one new token for each row of a batch, in one launch: positions are turned, the token attends to the
// keys of its window and, through features, to the state of all keys before them; then the window's oldest key joins the state,
// and the token takes its place. Compiled at run time for D, P, M, MAP, GATED, SPLITS, and HALF unless entries are float32.
//
//   qkv      (B, (H + 2 G)·D)  queries, keys and values of the new tokens; H = G·P
//   rotary   (2, B, D) or null  cosines, and sines whose first half is negated, of each row's place
//   keys, values  (B, G, W, D)  a ring; at oldest is its oldest key.    keep  (B, W)  which are real
//   state    (B, G, F, E)  float32; E = D + 1, numerators and the denominator
//   map_q, map_k, bias_q, bias_k  (H, D, M), (G, D, M), (H, M), (G, M)  float32.    mix  (H)
//   gate, gate_bias  (G, D), (G)  float32.    out  (B, H·D).    arrived  zero before and after
//
//   MAP 0    phi(x) = [softmax(x·W), softmax(-x·W)], F = 2 M
//   MAP 1    phi(x) = relu(x·W + b), F = M; all features are SMALLEST at least
//   GATED    the oldest key first decays the state by exp(-relu(gate·k + gate_bias))
//
// A cluster of SPLITS blocks takes a KV head of a row: each of them COLUMNS columns of the maps, the rows of the state that
// belong to these, and a part of the window's keys. They tell one another the maxima and sums of their softmaxes, and the
// first one what their features and keys add to the output. All that the new token does not change is on its way before it is
// there. The last head to arrive moves what the heads share: keep and oldest.

#include "common.cuh"

#ifdef HALF
typedef float16 entry;
#else
typedef float entry;
#endif
// A block reads ROWS rows of the state at once, a thread for each entry. Vectors: the queries of the head and the oldest key.
constexpr u32 E = D + 1, VECTORS = P + 1, SIGNS = MAP ? 1 : 2, ROWS = 256 / D;
constexpr u32 THREADS = (ROWS * E + 31) / 32 * 32, WARPS = THREADS / 32;
// A thread multiplies WIDE columns of a map, in one of SLICES slices of the vector, DEEP dimensions at once.
constexpr u32 WIDE = M % 4 ? 1 : 4, COLUMNS = ((M + SPLITS - 1) / SPLITS + WIDE - 1) / WIDE * WIDE;
constexpr u32 PACKS = COLUMNS / WIDE, PIECES = VECTORS * PACKS;
constexpr u32 SLICES = PIECES > THREADS ? 1 : THREADS / PIECES < D / 4 ? THREADS / PIECES : D / 4;
constexpr u32 SLICE = (D + SLICES - 1) / SLICES, DEEP = SLICE < 8 ? SLICE : 8;
// LANES lanes of a warp share a key of the window, 8 dimensions a lane.
constexpr u32 LANES = D > 64 ? 16 : D > 32 ? 8 : D > 16 ? 4 : D > 8 ? 2 : 1, KEYS = 32 / LANES;
// Rows of the state and values that a thread has on their way.
constexpr u32 STATE_DEEP = 8, VALUES_DEEP = SPLITS > 1 ? 4 : 2;
constexpr bool HOLDS_ALL = SIGNS * COLUMNS <= STATE_DEEP * ROWS;
constexpr float LOG2_E = 1.4426950408889634f, NEVER = -1e30f, SMALLEST = 1e-12f;

struct alignas(4 * WIDE) Pack { float of[WIDE]; };
struct alignas(16) Eight { entry of[8]; };
struct alignas(P % 4 ? 4 : 16) Weights { float of[P]; };
struct alignas(VECTORS <= 2 ? 8 : 16) Features { float of[VECTORS <= 2 ? 2 : (VECTORS + 3) / 4 * 4]; };
// Of one vector's columns in a block: the maxima of z and -z, the sums of exp2 below them; and the maximum of the near scores.
struct Found { float most[SIGNS], sum[SIGNS], near; };

// Entry d of a head, turned by its row's position and rounded as a stored key is.
__device__ inline entry turned(const entry* head, const entry* angle, u32 rows, u32 d) {
  if (!angle) return head[d];
  const float x = to_float(head[d]), y = to_float(head[(d + D / 2) % D]);
  return from_float<entry>(x * to_float(angle[d]) + y * to_float(angle[u64(rows) * D + d]));
}
__device__ inline float most_of_warp(float x) {
#pragma unroll
  for (u32 step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
  return x;
}
__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (u32 step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}
// All blocks of a head.
__device__ inline void meet() {
  if (SPLITS > 1) {
    __syncwarp();  // the barrier takes whole warps
    cluster_barrier();
  } else
    __syncthreads();
}
__device__ inline void put(float* at, u32 block, float x) {
  if (SPLITS > 1)
    to_block(at, block, x);
  else
    *at = x;
}

extern "C" __global__ void __launch_bounds__(THREADS, SPLITS > 1 ? 1 : 2)
    decode_linear(const entry* qkv, const entry* rotary, entry* keys, entry* values, u8* keep, float* state, i64* oldest,
                  const float* map_q, const float* map_k, const float* bias_q, const float* bias_k, const float* mix,
                  const float* gate, const float* gate_bias, entry* out, u32* arrived, i64 rows, i64 kv_heads, i64 window,
                  double scale) {
  let_next_come();
  __shared__ float vectors[VECTORS][D];
  __shared__ float products[SLICES][VECTORS * COLUMNS];
  __shared__ Features features[SIGNS * COLUMNS];
  __shared__ Found found[SPLITS][VECTORS];
  __shared__ float sums[ROWS][P * E];
  __shared__ float mixed[P], decay;
  __shared__ __align__(16) entry new_key[D], new_value[D];
  extern __shared__ __align__(16) float dynamic[];
  float* totals = dynamic;  // [SPLITS][P * E], of the first block
  Weights* weights = reinterpret_cast<Weights*>(dynamic + (SPLITS * P * E + 3) / 4 * 4);  // of the near keys: scores at first

  const u32 row = blockIdx.x, split = blockIdx.y, head = blockIdx.z;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
  const u32 places = u32(window), place = u32(*oldest);
  const u64 index = u64(row) * kv_heads + head;
  entry* k_ring = keys + index * places * D;
  entry* v_ring = values + index * places * D;
  const u8* kept = keep + u64(row) * places;
  // The keys of this block; that of the new token comes after those of the ring.
  const u32 each = (places + SPLITS) / SPLITS, first = min(split * each, places + 1), near = min(each, places + 1 - first);
  const u32 column0 = split * COLUMNS, columns = column0 < M ? min(COLUMNS, M - column0) : 0;
  // The thread's entry of the state's rows.
  const u32 r = threadIdx.x / E, e = threadIdx.x % E;
  float* own = state + (index * SIGNS * M + column0) * E + e;
  const auto is_row = [&](u32 at) { return r < ROWS && at < SIGNS * COLUMNS && at % COLUMNS < columns; };
  const auto row_of = [&](u32 at) { return own + (at / COLUMNS * M + at % COLUMNS) * E; };

  // What the new token does not change.
  Pack w[DEEP], bias;
  const auto load_map = [&](u32 item, u32 d) {
    const u32 pack = item % PACKS, vector = item / PACKS % VECTORS, slice = item / PIECES, m = pack * WIDE;
    const bool there = item < PIECES * SLICES && m < columns;
    const u64 of_head = vector < P ? u64(head) * P + vector : head;
    const float* map = (vector < P ? map_q : map_k) + of_head * D * M + column0 + m;
#pragma unroll
    for (u32 u = 0; u < DEEP; ++u) {
      const u32 at = slice * SLICE + d + u;
      w[u] = there && d + u < SLICE && at < D ? *reinterpret_cast<const Pack*>(map + at * M) : Pack{};
    }
    if (d == 0) {
      const float* biases = (vector < P ? bias_q : bias_k) + of_head * M + column0 + m;
      bias = MAP && there && slice == 0 ? *reinterpret_cast<const Pack*>(biases) : Pack{};
    }
  };
  load_map(threadIdx.x, 0);
  float s[STATE_DEEP];
  const auto load_state = [&](u32 at) {
#pragma unroll
    for (u32 u = 0; u < STATE_DEEP; ++u) s[u] = is_row(at + u * ROWS + r) ? *row_of(at + u * ROWS + r) : 0.0f;
  };
  load_state(0);
  Eight key;
  bool real;
  const auto load_key = [&](u32 j) {
    const u32 n = first + j;
    const bool there = j < near && n < places && part * 8 < D;
    real = j < near && (n >= places || kept[n]);
    key = there ? *reinterpret_cast<const Eight*>(k_ring + u64(n) * D + part * 8) : Eight{};
  };
  load_key(warp * KEYS + lane / LANES);
  entry v[VALUES_DEEP];
  const auto load_values = [&](u32 at) {
#pragma unroll
    for (u32 u = 0; u < VALUES_DEEP; ++u) {
      const u32 j = at + u * ROWS + r, n = first + j;
      v[u] = r < ROWS && e < D && j < near && n < places ? v_ring[u64(n) * D + e] : entry{};
    }
  };
  load_values(0);
  const bool old_real = kept[place];
  const float old_value = e < D ? to_float(v_ring[u64(place) * D + e]) : 1.0f;
  for (u32 d = threadIdx.x; d < D; d += THREADS) vectors[P][d] = to_float(k_ring[u64(place) * D + d]);
  if (threadIdx.x < P) mixed[threadIdx.x] = mix[head * P + threadIdx.x];
  if (GATED && warp == 0) {
    float x = 0.0f;
    for (u32 d = lane; d < D; d += 32) x += to_float(k_ring[u64(place) * D + d]) * gate[head * D + d];
    x = sum_of_warp(x) + gate_bias[head];
    if (lane == 0) decay = exp2f(-LOG2_E * fmaxf(x, 0.0f));
  }
  if (SPLITS > 1) meet();  // all have begun
  await_others();

  const entry* mine = qkv + u64(row) * kv_heads * (P + 2) * D;
  const entry* angle = rotary ? rotary + u64(row) * D : nullptr;
  const float sqrt_dim = sqrtf(float(D)), to_map = float(scale) * sqrt_dim;
  for (u32 at = threadIdx.x; at < P * D; at += THREADS)
    vectors[at / D][at % D] = to_float(turned(mine + (u64(head) * P + at / D) * D, angle, rows, at % D)) * to_map;
  for (u32 d = threadIdx.x; d < D; d += THREADS) {
    new_key[d] = turned(mine + (u64(kv_heads) * P + head) * D, angle, rows, d);
    new_value[d] = mine[(u64(kv_heads) * (P + 1) + head) * D + d];
  }
  __syncthreads();

  // The vectors' products with their maps, by slices, and the scores of the near keys in base 2.
  for (u32 item = threadIdx.x; item < PIECES * SLICES; item += THREADS) {
    const u32 pack = item % PACKS, vector = item / PACKS % VECTORS, slice = item / PIECES;
    if (item != threadIdx.x) load_map(item, 0);
    Pack z = bias;
    for (u32 d = 0; d < SLICE; d += DEEP) {
      if (d) load_map(item, d);
#pragma unroll
      for (u32 u = 0; u < DEEP; ++u) {
        const float x = vectors[vector][min(slice * SLICE + d + u, D - 1)];  // beyond it the map is 0
#pragma unroll
        for (u32 k = 0; k < WIDE; ++k) z.of[k] += x * w[u].of[k];
      }
    }
#pragma unroll
    for (u32 k = 0; k < WIDE; ++k) products[slice][vector * COLUMNS + pack * WIDE + k] = z.of[k];
  }
  for (u32 base = warp * KEYS; base < near; base += WARPS * KEYS) {
    const u32 j = base + lane / LANES;
    if (base != warp * KEYS) load_key(j);
    if (first + j == places && part * 8 < D) key = *reinterpret_cast<const Eight*>(new_key + part * 8);
#pragma unroll
    for (u32 p = 0; p < P; ++p) {
      float score = 0.0f;
      if (part * 8 < D)
#pragma unroll
        for (u32 k = 0; k < 8; ++k) score += vectors[p][part * 8 + k] * to_float(key.of[k]);
#pragma unroll
      for (u32 step = LANES / 2; step; step /= 2) score += __shfl_xor_sync(0xffffffff, score, step);
      if (part == 0 && j < near) weights[j].of[p] = real ? score * (LOG2_E / sqrt_dim) : NEVER;
    }
  }
  __syncthreads();

  // What the softmaxes of each block have, to all blocks.
  for (u32 x = warp; x < VECTORS; x += WARPS) {
    Found here;
#pragma unroll
    for (u32 sign = 0; sign < SIGNS; ++sign) here.most[sign] = NEVER, here.sum[sign] = 0.0f;
    here.near = NEVER;
    float* z_of = products[0] + x * COLUMNS;
    for (u32 m = lane; m < columns; m += 32) {
      float z = 0.0f;
#pragma unroll
      for (u32 slice = 0; slice < SLICES; ++slice) z += products[slice][x * COLUMNS + m];
      z_of[m] = z *= MAP ? 1.0f : LOG2_E;
#pragma unroll
      for (u32 sign = 0; sign < SIGNS; ++sign) here.most[sign] = fmaxf(here.most[sign], sign ? -z : z);
    }
    if (!MAP) {
#pragma unroll
      for (u32 sign = 0; sign < SIGNS; ++sign) {
        here.most[sign] = most_of_warp(here.most[sign]);
        for (u32 m = lane; m < columns; m += 32) here.sum[sign] += exp2f((sign ? -z_of[m] : z_of[m]) - here.most[sign]);
        here.sum[sign] = sum_of_warp(here.sum[sign]);
      }
    }
    if (x < P)
      for (u32 j = lane; j < near; j += 32) here.near = fmaxf(here.near, weights[j].of[x]);
    here.near = most_of_warp(here.near);
    if (lane < SPLITS) {
      Found* to = &found[split][x];
#pragma unroll
      for (u32 sign = 0; sign < SIGNS && !MAP; ++sign) put(&to->most[sign], lane, here.most[sign]), put(&to->sum[sign], lane, here.sum[sign]);
      put(&to->near, lane, here.near);
    }
  }
  meet();
  for (u32 x = warp; x < VECTORS; x += WARPS) {
    Found all = found[0][x];
#pragma unroll
    for (u32 block = 1; block < SPLITS; ++block) {
#pragma unroll
      for (u32 sign = 0; sign < SIGNS && !MAP; ++sign) all.most[sign] = fmaxf(all.most[sign], found[block][x].most[sign]);
      all.near = fmaxf(all.near, found[block][x].near);
    }
#pragma unroll
    for (u32 sign = 0; sign < SIGNS && !MAP; ++sign) {
      all.sum[sign] = 0.0f;
#pragma unroll
      for (u32 block = 0; block < SPLITS; ++block)
        all.sum[sign] += found[block][x].sum[sign] * exp2f(found[block][x].most[sign] - all.most[sign]);
    }
    for (u32 m = lane; m < columns; m += 32) {
      const float z = products[0][x * COLUMNS + m];
#pragma unroll
      for (u32 sign = 0; sign < SIGNS; ++sign) {
        const float phi = MAP ? z : exp2f((sign ? -z : z) - all.most[sign]) / all.sum[sign];
        features[sign * COLUMNS + m].of[x] = fmaxf(phi, SMALLEST);
      }
    }
    if (x < P)
      for (u32 j = lane; j < near; j += 32) weights[j].of[x] = mixed[x] * exp2f(weights[j].of[x] - all.near);
  }
  __syncthreads();

  // The sums over the state's rows and the near keys. The rows get the oldest key: where a thread holds all of its own, after
  // the output, since blocks that meet first wait for what they have stored.
  float y[P];
#pragma unroll
  for (u32 p = 0; p < P; ++p) y[p] = 0.0f;
  const float decayed = GATED ? decay : 1.0f;
  const auto absorb = [&](u32 at) {
#pragma unroll
    for (u32 u = 0; u < STATE_DEEP; ++u)
      if (const u32 i = at + u * ROWS + r; is_row(i) && old_real) *row_of(i) = decayed * s[u] + features[i].of[P] * old_value;
  };
  for (u32 at = 0; at < SIGNS * COLUMNS; at += STATE_DEEP * ROWS) {
    if (at) load_state(at);
#pragma unroll
    for (u32 u = 0; u < STATE_DEEP; ++u) {
      const u32 i = at + u * ROWS + r;
      if (!is_row(i)) continue;
      const Features phi = features[i];
#pragma unroll
      for (u32 p = 0; p < P; ++p) y[p] += phi.of[p] * s[u];
    }
    if (!HOLDS_ALL) absorb(at);
  }
  for (u32 at = 0; at < near; at += VALUES_DEEP * ROWS) {
    if (at) load_values(at);
#pragma unroll
    for (u32 u = 0; u < VALUES_DEEP; ++u) {
      const u32 j = at + u * ROWS + r;
      if (r >= ROWS || j >= near) continue;
      const float value = e == D ? 1.0f : to_float(first + j == places ? new_value[e] : v[u]);
      const Weights weight = weights[j];
#pragma unroll
      for (u32 p = 0; p < P; ++p) y[p] += weight.of[p] * value;
    }
  }
  if (r < ROWS)
#pragma unroll
    for (u32 p = 0; p < P; ++p) sums[r][p * E + e] = y[p];
  __syncthreads();
  for (u32 at = threadIdx.x; at < P * E; at += THREADS) {
    float total = 0.0f;
#pragma unroll
    for (u32 k = 0; k < ROWS; ++k) total += sums[k][at];
    put(totals + split * P * E + at, 0, total);
  }
  meet();
  if (split == SPLITS - 1 && threadIdx.x == THREADS - 1) {  // all blocks of this head have read what heads share
    __threadfence();
    const u32 last = u32(rows * kv_heads) - 1;
    if (atomicInc(arrived, last) == last) {
      for (u32 other = 0; other < u32(rows); ++other) keep[u64(other) * places + place] = 1;
      *oldest = place + 1 == places ? 0 : place + 1;
    }
  }
  if (split == 0) {
    for (u32 at = threadIdx.x; at < P * D; at += THREADS) {
      const float* of_head = totals + at / D * E;
      float numerator = 0.0f, denominator = 0.0f;
#pragma unroll
      for (u32 block = 0; block < SPLITS; ++block) {
        numerator += of_head[block * P * E + at % D];
        denominator += of_head[block * P * E + D];
      }
      out[index * P * D + at] = from_float<entry>(denominator == 0.0f ? numerator : numerator / denominator);
    }
    for (u32 d = threadIdx.x; d < D; d += THREADS) {
      k_ring[u64(place) * D + d] = new_key[d];
      v_ring[u64(place) * D + d] = new_value[d];
    }
  }
  if (HOLDS_ALL) absorb(0);
}
