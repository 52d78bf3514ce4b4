// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/checksum.hpp>
#include <dcp/io/s3_sign.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <ctime>
#include <string>
#include <utility>

using namespace dcp;

namespace {

// The examples of docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html.
std::string signature(S3Request request, std::string const& payload = "") {
  S3Credentials const credentials{"AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", ""};
  request.host = "examplebucket.s3.amazonaws.com";
  std::tm time{};
  time.tm_year = 113, time.tm_mon = 4, time.tm_mday = 24;
  s3_sign(request, hex_text(sha256(as_byte_span(payload))), credentials, "us-east-1", ::timegm(&time));
  auto const& authorization = request.headers.back();
  CHECK(authorization.first == "authorization");
  CHECK(authorization.second.starts_with("AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders="));
  return authorization.second.substr(authorization.second.find("Signature=") + 10);
}

}  // namespace

TEST_CASE("s3_sign: the signatures of AWS's own examples") {
  CHECK(signature({"GET", "", "/test.txt", {}, {{"range", "bytes=0-9"}}}) == "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
  CHECK(signature({"PUT", "", "/test$file.text", {}, {{"date", "Fri, 24 May 2013 00:00:00 GMT"}, {"x-amz-storage-class", "REDUCED_REDUNDANCY"}}}, "Welcome to Amazon S3.") ==
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd");
  CHECK(signature({"GET", "", "/", {{"lifecycle", ""}}, {}}) == "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543");
  CHECK(signature({"GET", "", "/", {{"prefix", "J"}, {"max-keys", "2"}}, {}}) == "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7");
}

TEST_CASE("s3_sign: a session token is sent and signed") {
  S3Request request{"GET", "host", "/", {}, {}};
  s3_sign(request, "UNSIGNED-PAYLOAD", {"key", "secret", "token"}, "eu-west-1", 0);
  CHECK(std::find(request.headers.begin(), request.headers.end(), std::pair<std::string, std::string>{"x-amz-security-token", "token"}) != request.headers.end());
  CHECK(request.headers.back().second.find("SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token,") != std::string::npos);
  for (auto const& [name, value] : request.headers) CHECK(value.find("secret") == std::string::npos);
}

TEST_CASE("s3_query: names and values are encoded, then sorted") {
  CHECK(s3_query({{"prefix", "a b/c+d&=~\xc3\xa9"}, {"X", ""}, {"list-type", "2"}}) == "X=&list-type=2&prefix=a%20b%2Fc%2Bd%26%3D~%C3%A9");
  CHECK(detail::s3_encoded("/a b/$", "/") == "/a%20b/%24");
  CHECK(detail::s3_decoded("a+b%2Bc%2") == "a b+c%2");
}

TEST_CASE("s3_element and s3_text: what stands in an answer, without escapes") {
  std::string const xml = "<R><C><K>a&amp;lt;b</K><S>1</S></C><C><K>&quot;x&quot;</K></C><P>p</P></R>";
  std::size_t at = 0;
  CHECK(s3_text(s3_element(xml, "C", at).value(), "K") == "a&lt;b");
  CHECK(s3_text(s3_element(xml, "C", at).value(), "K") == "\"x\"");
  CHECK(!s3_element(xml, "C", at).has_value());
  CHECK(s3_text(xml, "S") == "1");
  CHECK(s3_text(xml, "none") == "");
  CHECK(s3_text("<K>cut off", "K") == "");
}

TEST_CASE("s3_base64: the examples of RFC 4648, and a checksum as S3 writes it") {
  for (auto const& [text, encoded] : {std::pair<std::string, std::string>{"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"}, {"foob", "Zm9vYg=="}, {"fooba", "Zm9vYmE="}, {"foobar", "Zm9vYmFy"}})
    CHECK(detail::s3_base64(as_byte_span(text)) == encoded);
}
