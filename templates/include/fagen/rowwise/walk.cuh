// One thread's walk along its part of a line: reduce, then write. Elements that it holds in registers or in shared
// memory between the two are read once; the rest of a longer line is read again.
#pragma once
#include "fagen/rowwise/vector.cuh"

namespace fagen {

template <class Config, class In, class Line, class Softmax, int kWidth, int kStep>
struct Walk {
  static constexpr int kInputs = Softmax::kInputs;
  static constexpr bool kInRegisters = Config::kScheme == Scheme::registers;
  static constexpr bool kInShared = Config::kScheme == Scheme::shared;
  static constexpr int kHeld = kInRegisters || kInShared ? Config::kHeld : 0;
  // vectors that are loaded before any of them is used, so that a thread has them on their way together
  static constexpr int kAtOnce = Config::kThreads * Config::kLines >= 1024 || kInputs == 2 ? 2 : 4;
  using Held = Vector<In, kWidth>;
  using State = typename Softmax::State;

  struct Loaded {
    Held vector[kInputs];

    __device__ __forceinline__ void to_floats(float (&x)[kInputs][kWidth]) const {
#pragma unroll
      for (int input = 0; input < kInputs; ++input) vector[input].to_floats(x[input]);
    }
  };

  const Line& line;
  Held* shared;  // of the block: a thread's own vectors lie a block's width apart, and no other thread reads them
  Loaded held[kInRegisters ? kHeld : 1];

  __device__ Walk(const Line& line, unsigned char* memory)
      : line(line), shared(reinterpret_cast<Held*>(memory) + threadIdx.x) {}

  // Reduces the whole line; every thread of the team has the result.
  template <class Team>
  __device__ State reduce_line(Team& team) {
    State state;
    if constexpr (Config::kScheme == Scheme::three_pass) {  // the maximum is known before anything is summed
      each(0, [&](int, const Loaded& loaded) { with_floats(loaded, [&](auto& x) { Softmax::add_max(state, x); }); });
      Softmax::share_max(state, team);
      each(0, [&](int, const Loaded& loaded) { with_floats(loaded, [&](auto& x) { Softmax::add_sum(state, x); }); });
      state.sum = team.reduce_sum(state.sum);
    } else {
      line.whole ? reduce<true>(state) : reduce<false>(state);
      Softmax::share(state, team);
    }
    return state;
  }

  __device__ void write(const Softmax& softmax) { line.whole ? write<true>(softmax) : write<false>(softmax); }

 private:
  __device__ __forceinline__ int place(int i) const { return line.first + i * kStep; }
  __device__ __forceinline__ Held& held_in_shared(int i, int input) {
    return shared[(i * kInputs + input) * Config::kThreads * Config::kLines];
  }

  // Vectors of this thread from the `first`-th on.
  template <bool kWhole, int kCount>
  __device__ __forceinline__ void load(Loaded (&to)[kCount], int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (place(first + i) < line.end)
#pragma unroll
        for (int input = 0; input < kInputs; ++input)
          to[i].vector[input] = line.template load<kWhole>(input, place(first + i), Softmax::kFill);
  }
  // Calls use(place, vector) for each vector from the `first`-th on.
  template <bool kWhole, class Use>
  __device__ __forceinline__ void each(int first, Use use) const {
    for (; place(first) < line.end; first += kAtOnce) {
      Loaded loaded[kAtOnce];
      load<kWhole>(loaded, first);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (place(first + i) < line.end) use(place(first + i), loaded[i]);
    }
  }

  template <class Use>
  __device__ __forceinline__ void each(int first, Use use) const {
    line.whole ? each<true>(first, use) : each<false>(first, use);
  }

  template <bool kWhole>
  __device__ __forceinline__ void reduce(State& state) {  // online: the sum follows the maximum
    if constexpr (kInRegisters) {
      load<kWhole>(held, 0);
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (place(i) < line.end) add(state, held[i]);
    }
    if constexpr (kInShared) {
      Loaded loaded[kHeld];
      load<kWhole>(loaded, 0);
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (place(i) < line.end) {
#pragma unroll
          for (int input = 0; input < kInputs; ++input) held_in_shared(i, input) = loaded[i].vector[input];
          add(state, loaded[i]);
        }
    }
    each<kWhole>(kHeld, [&](int, const Loaded& loaded) { add(state, loaded); });
  }

  template <bool kWhole>
  __device__ __forceinline__ void write(const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (place(i) < line.end) {
        Loaded loaded;
        if constexpr (kInRegisters) loaded = held[i];
        if constexpr (kInShared)
#pragma unroll
          for (int input = 0; input < kInputs; ++input) loaded.vector[input] = held_in_shared(i, input);
        write<kWhole>(softmax, place(i), loaded);
      }
    each<kWhole>(kHeld, [&](int at, const Loaded& loaded) { write<kWhole>(softmax, at, loaded); });
  }

  template <class Use>
  __device__ __forceinline__ static void with_floats(const Loaded& loaded, Use use) {
    float x[kInputs][kWidth];
    loaded.to_floats(x);
    use(x);
  }
  __device__ __forceinline__ static void add(State& state, const Loaded& loaded) {
    with_floats(loaded, [&](auto& x) { Softmax::add(state, x); });
  }
  template <bool kWhole>
  __device__ __forceinline__ void write(const Softmax& softmax, int at, const Loaded& loaded) const {
    float x[kInputs][kWidth], y[kWidth];
    loaded.to_floats(x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float one[kInputs];
#pragma unroll
      for (int input = 0; input < kInputs; ++input) one[input] = x[input][i];
      y[i] = softmax(one);
    }
    line.template store<kWhole>(at, y);
  }
};

}  // namespace fagen
