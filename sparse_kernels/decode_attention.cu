// Attention of one new token for each row of a batch, over preallocated keys and values: positions are turned, the token's
// key and value stored, and what the row has so far read once, all in one launch. Compiled at run time for HALF, D, P, KV_SPLITS.
//
//   qkv      (B, (H + 2 G)·D)  queries, keys and values of the new tokens; H = G·P
//   rotary   (2, B, D) or null  cosines, and sines whose first half is negated, of each row's place
//   keys, values  (slots, G, T, D)  row b is slot b, of which places[b] are filled; the new token gets the next
//   out      (B, H·D)
//
// A block takes a KV head of a row and one of KV_SPLITS parts of its keys. Of a warp, LANES lanes share a key, 8 dimensions a
// lane, so that KEYS keys are read at once, and UNROLL times as many are on their way. The last block of a head to arrive adds
// the parts. space: for each (row, KV head) a counter, which is zero before and after; then its parts.

#include "common.cuh"

constexpr u32 power_above(u32 x) { return x <= 1 ? 1 : 2 * power_above((x + 1) / 2); }
constexpr u32 LANES = power_above(D / 8), KEYS = 32 / LANES, WARPS = 4, UNROLL = P <= 4 ? 8 : 4, GROUPS = WARPS * KEYS;
constexpr u32 THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.4426950408889634f, NEVER = -1e30f;

__device__ inline void unpack(const uint4& x, float* y) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (u32 k = 0; k < 8; ++k) y[k] = to_float(u16(words[k / 2] >> (k % 2 * 16)));
}

// Entry d of a head, turned by its row's position and rounded as a stored key is.
__device__ inline u16 turned(const u16* head, const u16* rotary, u32 rows, u32 d) {
  if (!rotary) return head[d];
  const float x = to_float(head[d]), y = to_float(head[(d + D / 2) % D]);
  return from_float(x * to_float(rotary[d]) + y * to_float(rotary[u64(rows) * D + d]));
}

struct Sum {
  float most[P], weight[P], y[P][8];
};

extern "C" __global__ void __launch_bounds__(THREADS)
    decode_attention(const u16* qkv, const u16* rotary, u16* keys, u16* values, const int* filled, u16* out, float* space,
                     i64 rows, i64 kv_heads, i64 places, i64 window, double scale) {
  let_next_come();
  const u32 row = blockIdx.x, head = blockIdx.y, split = blockIdx.z;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, group = warp * KEYS + lane / LANES;
  const u32 place = filled[row], first = window && place + 1 > window ? place + 1 - u32(window) : 0;
  // Each split as many keys, in whole turns of all groups.
  const u32 turn = GROUPS, each = ((place + 1 - first + KV_SPLITS - 1) / KV_SPLITS + turn - 1) / turn * turn;
  const u32 begin = min(first + split * each, place + 1), end = min(begin + each, place + 1);

  const u64 heads = u64(kv_heads) * (P + 2) * D;
  const u16* mine = qkv + row * heads;
  const u16* angle = rotary ? rotary + u64(row) * D : nullptr;
  u16* k_cache = keys + (u64(row) * kv_heads + head) * places * D;
  u16* v_cache = values + (u64(row) * kv_heads + head) * places * D;
  // The first keys are on their way before the new token is there.
  const bool inside = part * 8 < D;
  uint4 k_packed[UNROLL], v_packed[UNROLL];
  const auto load = [&](u32 at) {
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
      const u32 key = at + u * GROUPS + group;
      const bool there = inside && key < end && key < place;
      const u64 offset = u64(key) * D + part * 8;
      k_packed[u] = there ? *reinterpret_cast<const uint4*>(k_cache + offset) : make_uint4(0, 0, 0, 0);
      v_packed[u] = there ? *reinterpret_cast<const uint4*>(v_cache + offset) : make_uint4(0, 0, 0, 0);
    }
  };
  load(begin);
  await_others();
  __shared__ float query[P][D], most[GROUPS][P], weight[GROUPS][P];
  __shared__ float sums[GROUPS][P][D];
  __shared__ alignas(16) u16 new_key[D], new_value[D];
  for (u32 at = threadIdx.x; at < P * D; at += THREADS)
    query[at / D][at % D] = to_float(turned(mine + (head * P + at / D) * D, angle, rows, at % D)) * float(scale) * LOG2_E;
  if (begin <= place && place < end)
    for (u32 d = threadIdx.x; d < D; d += THREADS) {
      k_cache[u64(place) * D + d] = new_key[d] = turned(mine + (kv_heads * P + head) * D, angle, rows, d);
      v_cache[u64(place) * D + d] = new_value[d] = mine[(kv_heads * (P + 1) + head) * D + d];
    }
  __syncthreads();

  float q[P][8];
#pragma unroll
  for (u32 p = 0; p < P; ++p)
#pragma unroll
    for (u32 k = 0; k < 8; ++k) q[p][k] = inside ? query[p][part * 8 + k] : 0.0f;
  Sum sum;
#pragma unroll
  for (u32 p = 0; p < P; ++p) {
    sum.most[p] = NEVER, sum.weight[p] = 0.0f;
#pragma unroll
    for (u32 k = 0; k < 8; ++k) sum.y[p][k] = 0.0f;
  }
  for (u32 at = begin; at < end; at += GROUPS * UNROLL) {
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u)
      if (at + u * GROUPS + group == place && place < end && inside) {
        k_packed[u] = *reinterpret_cast<const uint4*>(new_key + part * 8);
        v_packed[u] = *reinterpret_cast<const uint4*>(new_value + part * 8);
      }
    float score[UNROLL][P];
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
      float k[8];
      unpack(k_packed[u], k);
#pragma unroll
      for (u32 p = 0; p < P; ++p) {
        float s = 0.0f;
#pragma unroll
        for (u32 d = 0; d < 8; ++d) s += q[p][d] * k[d];
#pragma unroll
        for (u32 step = LANES / 2; step; step /= 2) s += __shfl_xor_sync(0xffffffff, s, step);
        score[u][p] = at + u * GROUPS + group < end ? s : NEVER;
      }
    }
#pragma unroll
    for (u32 p = 0; p < P; ++p) {
      float most_now = sum.most[p];
#pragma unroll
      for (u32 u = 0; u < UNROLL; ++u) most_now = fmaxf(most_now, score[u][p]);
      const float shrink = exp2f(sum.most[p] - most_now);
      sum.most[p] = most_now;
      sum.weight[p] *= shrink;
#pragma unroll
      for (u32 d = 0; d < 8; ++d) sum.y[p][d] *= shrink;
    }
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
      float v[8];
      unpack(v_packed[u], v);
      const bool there = at + u * GROUPS + group < end;
#pragma unroll
      for (u32 p = 0; p < P; ++p) {
        const float w = there ? exp2f(score[u][p] - sum.most[p]) : 0.0f;
        sum.weight[p] += w;
#pragma unroll
        for (u32 d = 0; d < 8; ++d) sum.y[p][d] += w * v[d];
      }
    }
    if (at + GROUPS * UNROLL < end) load(at + GROUPS * UNROLL);
  }

  // The groups of the block add up.
#pragma unroll
  for (u32 p = 0; p < P; ++p) {
    if (part == 0) most[group][p] = sum.most[p], weight[group][p] = sum.weight[p];
    if (inside)
#pragma unroll
      for (u32 k = 0; k < 8; ++k) sums[group][p][part * 8 + k] = sum.y[p][k];
  }
  __syncthreads();
  const u32 index = row * u32(kv_heads) + head;
  u32* arrived = reinterpret_cast<u32*>(space);
  float* parts = space + rows * kv_heads + u64(index) * KV_SPLITS * P * (D + 2);  // of this head: [split][p][y, most, weight]
  for (u32 at = threadIdx.x; at < P * D; at += THREADS) {
    const u32 p = at / D, d = at % D;
    float all = NEVER, total = 0.0f, y = 0.0f;
#pragma unroll
    for (u32 g = 0; g < GROUPS; ++g) all = fmaxf(all, most[g][p]);
#pragma unroll
    for (u32 g = 0; g < GROUPS; ++g) {
      const float w = exp2f(most[g][p] - all);
      total += w * weight[g][p];
      y += w * sums[g][p][d];
    }
    if (KV_SPLITS == 1)
      out[(u64(row) * kv_heads + head) * P * D + at] = from_float(y / total);
    else {
      float* to = parts + (split * P + p) * (D + 2);
      to[d] = y;
      if (d == 0) to[D] = all, to[D + 1] = total;
    }
  }
  if (KV_SPLITS == 1) return;
  __shared__ u32 before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrived + index, 1);
  __syncthreads();
  if (before + 1 < KV_SPLITS) return;
  __threadfence();
  if (threadIdx.x == 0) arrived[index] = 0;
  // The weight of each split first, all of them at once, then its sums.
  __shared__ float split_weight[P][KV_SPLITS];
  for (u32 at = threadIdx.x; at < P * KV_SPLITS; at += THREADS)
    split_weight[at % P][at / P] = __ldcg(parts + at / P * P * (D + 2) + at % P * (D + 2) + D);
  __syncthreads();
  for (u32 at = threadIdx.x; at < P * D; at += THREADS) {
    const u32 p = at / D, d = at % D;
    float all = NEVER, total = 0.0f, y = 0.0f;
#pragma unroll
    for (u32 s = 0; s < KV_SPLITS; ++s) all = fmaxf(all, split_weight[p][s]);
#pragma unroll 16
    for (u32 s = 0; s < KV_SPLITS; ++s) {
      const float* from = parts + (s * P + p) * (D + 2);
      const float w = exp2f(split_weight[p][s] - all);
      total += w * __ldcg(from + D + 1);
      y += w * __ldcg(from + d);
    }
    out[(u64(row) * kv_heads + head) * P * D + at] = from_float(y / total);
  }
}
