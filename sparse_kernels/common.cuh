// What all sources share. Nothing of CUDA's headers is read at run time, so 16-bit floats are their bits with two conversions
// each; HALF says which of them a source is compiled for, if it is for one.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct bf16 { u16 bits; };
struct fp16 { u16 bits; };
struct e4m3 { u8 bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ inline float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ inline fp16 from_float<fp16>(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// To the nearest, ties to even; what is beyond the largest becomes the largest.
template <> __device__ inline e4m3 from_float<e4m3>(float x) {
#if __CUDA_ARCH__ >= 890
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return {u8(pair)};
#else
  return {0};  // cuda.py does not launch it there
#endif
}

#ifdef HALF
#if HALF
typedef fp16 float16;
#else
typedef bf16 float16;
#endif
__device__ inline float to_float(u16 bits) { return to_float(float16{bits}); }
__device__ inline u16 from_float(float x) { return from_float<float16>(x).bits; }
#endif

// A kernel of inference is launched before the one in front of it has ended: it lets the next one come at once, reads its
// weights, and then awaits what others write.
#if __CUDA_ARCH__ >= 900
__device__ inline void let_next_come() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void await_others() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ inline void let_next_come() {}
__device__ inline void await_others() {}
#endif
