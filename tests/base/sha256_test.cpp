// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/sha256.hpp>
#include <dcp/base/text.hpp>

#include <doctest/doctest.h>

#include <string>

using namespace dcp;

namespace {
std::string hash(std::string const& text) { return hex_text(sha256(as_byte_span(text))); }
std::string hmac(std::string const& key, std::string const& text) { return hex_text(hmac_sha256(as_byte_span(key), as_byte_span(text))); }
}  // namespace

TEST_CASE("SHA-256: the digests of FIPS 180-4's examples") {
  CHECK(hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hash(std::string(1'000'000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("law: SHA-256 of a message is the same in whatever pieces it comes") {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  for (std::size_t size = 0; size <= text.size(); size += 3)
    for (std::size_t cut = 0; cut <= size; cut += 5) {
      Sha256<> pieces;
      pieces.add(as_byte_span(std::string_view{text}.substr(0, cut))).add(as_byte_span(std::string_view{text}.substr(cut, size - cut)));
      REQUIRE(hex_text(pieces.digest()) == hash(text.substr(0, size)));
    }
}

TEST_CASE("HMAC-SHA-256: the test cases of RFC 4231") {
  CHECK(hmac(std::string(20, '\x0b'), "Hi There") == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  CHECK(hmac("Jefe", "what do ya want for nothing?") == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK(hmac(std::string(20, '\xaa'), std::string(50, '\xdd')) == "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
  CHECK(hmac(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First") == "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}
