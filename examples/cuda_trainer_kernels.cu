// SPDX-License-Identifier: Apache-2.0
// Plain kernels, nothing of dcp. Every sum is made by one thread and in one order, so that a step that is repeated has the same bits.
#include "cuda_trainer_kernels.hpp"

#include <stdexcept>
#include <string>

namespace {

__device__ int thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

/// A number in [-1, 1) that depends on nothing but its argument.
__device__ float uniform(std::int64_t index) {
  std::uint64_t x = static_cast<std::uint64_t>(index) + 0x9e3779b97f4a7c15u;   // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<float>((x ^ (x >> 31)) >> 40) * 0x1p-23f - 1.0f;
}
__device__ float input(std::int64_t example, int k) { return uniform((std::int64_t{1} << 40) + example * inputs + k); }

__global__ void fill(float* w) {
  int const i = thread();
  if (i < weights) w[i] = i < up ? 0.2f * uniform(i) : i < up + hidden ? 0.0f : 0.03f * uniform(i);
}
__global__ void first_layer(float const* w, std::int64_t first, float* h) {
  int const i = thread(), unit = i % hidden;
  if (i >= batch * hidden) return;
  float sum = w[up + unit];
  for (int k = 0; k < inputs; ++k) sum += w[unit * inputs + k] * input(first + i / hidden, k);
  h[i] = tanhf(sum);
}
__global__ void second_layer(float const* w, std::int64_t first, float const* h, float* error) {
  int const i = thread();
  if (i >= batch) return;
  float sum = 0;
  for (int unit = 0; unit < hidden; ++unit) sum += w[up + hidden + unit] * h[i * hidden + unit];
  error[i] = sum - tanhf(2 * (input(first + i, 0) - input(first + i, 1)));
}
__global__ void backward(float const* w, std::int64_t first, float const* h, float const* error, float* gradient) {
  int const g = thread();
  if (g > weights) return;
  int const unit = g < up ? g / inputs : (g - up) % hidden;
  float sum = 0;
  for (int i = 0; i < batch; ++i) {
    float const y = h[i * hidden + unit];
    if (g == weights) sum += error[i] * error[i];                       // the loss
    else if (g >= up + hidden) sum += error[i] * y;
    else sum += error[i] * w[up + hidden + unit] * (1 - y * y) * (g < up ? input(first + i, g % inputs) : 1.0f);
  }
  gradient[g] = sum / batch;
}
__global__ void descend(float* w, float* velocity, float const* gradient, float share, float* loss) {
  int const i = thread();
  if (i == weights) *loss = gradient[i] * share;
  if (i >= weights) return;
  velocity[i] = 0.9f * velocity[i] + gradient[i] * share;
  w[i] -= 0.02f * velocity[i];
}

template <class... Parameters, class... Arguments>
void run(cudaStream_t stream, int threads, void (*kernel)(Parameters...), Arguments... arguments) {
  kernel<<<(threads + 255) / 256, 256, 0, stream>>>(arguments...);
  if (cudaError_t const status = cudaGetLastError(); status != cudaSuccess) throw std::runtime_error(std::string{"CUDA: "} + cudaGetErrorString(status));
}

}  // namespace

void initialise(cudaStream_t stream, float* w) { run(stream, weights, fill, w); }
void gradients(cudaStream_t stream, float const* w, std::int64_t first, float* h, float* error, float* gradient) {
  run(stream, batch * hidden, first_layer, w, first, h);
  run(stream, batch, second_layer, w, first, h, error);
  run(stream, weights + 1, backward, w, first, h, error, gradient);
}
void update(cudaStream_t stream, float* w, float* velocity, float const* gradient, float share, float* loss) { run(stream, weights + 1, descend, w, velocity, gradient, share, loss); }
