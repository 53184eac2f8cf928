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
  static constexpr int kRegisters = kInRegisters ? kHeld : 1;
  using Held = Vector<In, kWidth>;
  using State = typename Softmax::State;

  const Line& line;
  Held* shared;  // of the block: a thread's own vectors lie a block's width apart, and no other thread reads them
  Held held[kRegisters][kInputs];

  __device__ Walk(const Line& line, unsigned char* memory)
      : line(line), shared(reinterpret_cast<Held*>(memory) + threadIdx.x) {}

  // Reduces the whole line; every thread of the team has the result.
  template <class Team>
  __device__ State reduce_line(Team& team) {
    if constexpr (Config::kScheme == Scheme::three_pass) {
      return reduce_in_two(team);
    } else {
      State state = reduce();
      Softmax::share(state, team);
      return state;
    }
  }

  __device__ void write(const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = line.first + i * kStep;
      if (at < line.end) write(softmax, at, take(i));
    }
    for (int at = line.first + kHeld * kStep; at < line.end; at += kStep) write(softmax, at, Loaded(line, at));
  }

 private:
  // Online: the sum follows the maximum.
  __device__ State reduce() {
    State state;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = line.first + i * kStep;
      if (at < line.end) add(state, hold(i, at));
    }
    for (int at = line.first + kHeld * kStep; at < line.end; at += kStep) add(state, Loaded(line, at));
    return state;
  }

  // Safe: the maximum of the whole line is known before anything is summed.
  template <class Team>
  __device__ State reduce_in_two(Team& team) {
    State state;
    float x[kInputs][kWidth];
    for (int at = line.first; at < line.end; at += kStep) {
      Loaded(line, at).to_floats(x);
      Softmax::add_max(state, x);
    }
    Softmax::share_max(state, team);
    for (int at = line.first; at < line.end; at += kStep) {
      Loaded(line, at).to_floats(x);
      Softmax::add_sum(state, x);
    }
    state.sum = team.reduce_sum(state.sum);
    return state;
  }

  struct Loaded {
    Held vector[kInputs];

    __device__ Loaded() {}
    __device__ Loaded(const Line& line, int at) {
#pragma unroll
      for (int input = 0; input < kInputs; ++input) vector[input] = line.load(input, at, Softmax::kFill);
    }
    __device__ void to_floats(float (&x)[kInputs][kWidth]) const {
#pragma unroll
      for (int input = 0; input < kInputs; ++input) vector[input].to_floats(x[input]);
    }
  };

  __device__ Held& place(int i, int input) { return shared[(i * kInputs + input) * Config::kThreads * Config::kLines]; }

  __device__ Loaded hold(int i, int at) {
    const Loaded loaded(line, at);
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      if constexpr (kInRegisters) held[i][input] = loaded.vector[input];
      if constexpr (kInShared) place(i, input) = loaded.vector[input];
    }
    return loaded;
  }
  __device__ Loaded take(int i) {
    Loaded loaded;
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      if constexpr (kInRegisters) loaded.vector[input] = held[i][input];
      if constexpr (kInShared) loaded.vector[input] = place(i, input);
    }
    return loaded;
  }

  __device__ static void add(State& state, const Loaded& loaded) {
    float x[kInputs][kWidth];
    loaded.to_floats(x);
    Softmax::add(state, x);
  }
  __device__ void write(const Softmax& softmax, int at, const Loaded& loaded) const {
    float x[kInputs][kWidth], y[kWidth];
    loaded.to_floats(x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float one[kInputs];
#pragma unroll
      for (int input = 0; input < kInputs; ++input) one[input] = x[input][i];
      y[i] = softmax(one);
    }
    line.store(at, y);
  }
};

}  // namespace fagen
