// SPDX-License-Identifier: Apache-2.0
#include <tally.hpp>
#include "../uses_dcp.hpp"   // a second translation unit with the same headers: everything in them is inline

int main() { return uses_dcp() && tally::twice({7, 5}) == 70 ? 0 : 1; }
