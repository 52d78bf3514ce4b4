// SPDX-License-Identifier: Apache-2.0
#pragma once
// What cuda_trainer.cpp trains: y = down * tanh(up * x + bias), which learns a function of the first two of its inputs. All memory is the device's.
#include <cuda_runtime_api.h>

#include <cstdint>

constexpr int inputs = 64, hidden = 1024, batch = 256;            // numbers per example; units; examples of a rank in a step
constexpr int up = hidden * inputs, weights = up + 2 * hidden;    // in memory: up, bias, down

void initialise(cudaStream_t stream, float* w);
/// The gradients of the mean square of the errors over examples [first, first + batch), and behind them that mean. `h`, `error`: batch * hidden, batch.
void gradients(cudaStream_t stream, float const* w, std::int64_t first, float* h, float* error, float* gradient);
/// A step of SGD with momentum, by `gradient` times `share`; the loss goes to `loss`.
void update(cudaStream_t stream, float* w, float* velocity, float const* gradient, float share, float* loss);
