// SPDX-License-Identifier: Apache-2.0
// The one file of a program that nvcc compiles.
#include <dcp/device/cuda_decoders.cuh>
