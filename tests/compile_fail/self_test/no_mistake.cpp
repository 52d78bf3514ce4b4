// SPDX-License-Identifier: Apache-2.0
// script: it compiles with the mistake
// error: our sentence
#ifdef MISTEAK
static_assert(sizeof(int) == 1, "our sentence");
#endif
int main() {}
