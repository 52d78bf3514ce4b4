// SPDX-License-Identifier: Apache-2.0
#pragma once
// SHA-256 as text, to compare tensors with what the golden files say of them.

#include <dcp/base/sha256.hpp>
#include <dcp/base/text.hpp>

#include <string>

namespace dcp::test {

/// The digest in hexadecimal.
inline std::string sha256(ConstByteSpan message) { return hex_text(dcp::sha256(message)); }

}  // namespace dcp::test
