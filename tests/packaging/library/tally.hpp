// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <dcp/core/shape.hpp>

namespace tally {
std::int64_t twice(dcp::Extents const& shape);
}
