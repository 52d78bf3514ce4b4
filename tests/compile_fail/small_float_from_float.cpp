// SPDX-License-Identifier: Apache-2.0
// A small float is made explicitly: dcp::bf16{0.1f} says that it rounds.
// error (gcc): from 'float' to 'dcp::bf16'
// error (clang): no viable conversion from returned value of type 'float' to function return type 'dcp::bf16'
// error (nvcc): no suitable constructor exists to convert from "float" to
#include <dcp/core/dtype.hpp>

#ifdef MISTAKE
dcp::bf16 learning_rate() { return 0.1f; }
#else
dcp::bf16 learning_rate() { return dcp::bf16{0.1f}; }
#endif

int main() { return static_cast<int>(learning_rate().bits()); }
