// SPDX-License-Identifier: Apache-2.0
// Only the headers: a warning here is about them.
#include "../uses_dcp.hpp"
