// SPDX-License-Identifier: Apache-2.0
// script: it does not compile without the mistake
// error: our sentence
#ifdef MISTAKE
static_assert(sizeof(int) == 1, "our sentence");
#else
int x = no_such_name;
#endif
int main() {}
