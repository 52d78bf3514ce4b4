// SPDX-License-Identifier: Apache-2.0
// error: dcp: a quantization block of no element; its sizes count rows and columns, from 1 up
// error (gcc): the comparison reduces to '(0 > 0)'
#include <dcp/storage/quantized.hpp>

#ifdef MISTAKE
using Scheme = dcp::Fp8Block<0, 128>;
#else
using Scheme = dcp::Fp8Block<1, 128>;
#endif

int main() { return static_cast<int>(Scheme::expected.kind) - 1; }
