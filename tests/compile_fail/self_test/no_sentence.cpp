// SPDX-License-Identifier: Apache-2.0
// script: says what
// Nothing here says what the error is.
#ifdef MISTAKE
static_assert(sizeof(int) == 1, "our sentence");
#endif
int main() {}
