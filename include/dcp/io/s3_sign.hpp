// SPDX-License-Identifier: Apache-2.0
#pragma once
// Requests to an object store that speaks S3, and their signature (AWS Signature Version 4, in headers). No I/O.
//
// Written here because what libcurl signs depends on its version: 7.88, which Debian 12 has, neither sorts nor encodes queries before it signs them,
// and would have to be handed the secret key.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/sha256.hpp>
#include <dcp/base/text.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <ctime>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// Who signs. Never part of an Error, a report or a record.
struct S3Credentials {
  std::string access_key, secret_key;
  std::string session_token;   // of temporary ones
};

/// Names and values as they are, encoded by nobody yet.
struct S3Request {
  using Fields = std::vector<std::pair<std::string, std::string>>;
  std::string method;           // "GET"
  std::string host;             // with a port if it is not the usual one
  std::string path;             // "/bucket/key", or "/key" where the host says the bucket
  Fields query = {};
  Fields headers = {};          // names in lower case, all of them signed
};

namespace detail {

/// Percent-encoded, but for unreserved characters and those in `also`.
template <class = Deferred>
std::string s3_encoded(std::string_view text, std::string_view also = {}) {
  std::string out;
  for (char const c : text) {
    auto const byte = static_cast<unsigned char>(c);
    bool const plain = (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z') || (byte >= '0' && byte <= '9') || std::string_view{"-._~"}.find(c) != std::string_view::npos;
    if (plain || also.find(c) != std::string_view::npos) out += c;
    else out += '%', out += "0123456789ABCDEF"[byte >> 4], out += "0123456789ABCDEF"[byte & 15];
  }
  return out;
}
/// The reverse; a '+' is a space, as stores write it in lists.
template <class = Deferred>
std::string s3_decoded(std::string_view text) {
  auto const digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && digit(text[i + 1]) >= 0 && digit(text[i + 2]) >= 0) {
      out += static_cast<char>(digit(text[i + 1]) * 16 + digit(text[i + 2]));
      i += 2;
    } else {
      out += text[i] == '+' ? ' ' : text[i];
    }
  }
  return out;
}

template <class = Deferred>
std::string s3_base64(ConstByteSpan bytes) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    std::uint32_t group = 0;
    for (std::size_t i = 0; i < 3; ++i) group = group << 8 | (at + i < bytes.size() ? std::to_integer<std::uint32_t>(bytes[at + i]) : 0);
    for (std::size_t i = 0; i < 4; ++i) out += at + i > bytes.size() ? '=' : digits[group >> (18 - 6 * i) & 63];
  }
  return out;
}

}  // namespace detail

/// The query as it stands in the URL and in what is signed: encoded, sorted.
template <class = Deferred>
std::string s3_query(S3Request::Fields const& query) {
  S3Request::Fields encoded;
  for (auto const& [name, value] : query) encoded.emplace_back(detail::s3_encoded(name), detail::s3_encoded(value));
  std::sort(encoded.begin(), encoded.end());
  std::string out;
  for (auto const& [name, value] : encoded) out += (out.empty() ? "" : "&") + name + '=' + value;
  return out;
}

/// Adds the headers that sign the request, all but "host", which whoever sends it adds.
///
/// `payload`  the SHA-256 of the body in hexadecimal, or "UNSIGNED-PAYLOAD"
/// Source     docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, whose examples are tests
template <class = Deferred>
void s3_sign(S3Request& request, std::string const& payload, S3Credentials const& credentials, std::string const& region, std::time_t now) {
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  std::array<char, 17> text{};
  std::strftime(text.data(), text.size(), "%Y%m%dT%H%M%SZ", &utc);
  std::string const time{text.data()}, date = time.substr(0, 8), scope = date + '/' + region + "/s3/aws4_request";
  request.headers.emplace_back("x-amz-content-sha256", payload);
  request.headers.emplace_back("x-amz-date", time);
  if (!credentials.session_token.empty()) request.headers.emplace_back("x-amz-security-token", credentials.session_token);

  auto sorted = request.headers;
  sorted.emplace_back("host", request.host);
  std::sort(sorted.begin(), sorted.end());
  std::string canonical = request.method + '\n' + detail::s3_encoded(request.path, "/") + '\n' + s3_query(request.query) + '\n', names;
  for (auto const& [name, value] : sorted) canonical += name + ':' + value + '\n', names += (names.empty() ? "" : ";") + name;
  canonical += '\n' + names + '\n' + payload;

  std::string const to_sign = "AWS4-HMAC-SHA256\n" + time + '\n' + scope + '\n' + hex_text(sha256(as_byte_span(canonical)));
  auto key = hmac_sha256(as_byte_span("AWS4" + credentials.secret_key), as_byte_span(date));
  for (std::string_view const part : {std::string_view{region}, std::string_view{"s3"}, std::string_view{"aws4_request"}}) key = hmac_sha256(key, as_byte_span(part));
  request.headers.emplace_back("authorization", "AWS4-HMAC-SHA256 Credential=" + credentials.access_key + '/' + scope + ",SignedHeaders=" + names +
                                                    ",Signature=" + hex_text(hmac_sha256(key, as_byte_span(to_sign))));
}

/// What stands between <name> and </name> at or after `at`, which moves behind it; nothing if there is no more. Enough for what stores answer: no
/// element of theirs holds one of its own name.
template <class = Deferred>
std::optional<std::string_view> s3_element(std::string_view xml, std::string_view name, std::size_t& at) {
  std::string const open = '<' + std::string{name} + '>', close = "</" + std::string{name} + '>';
  auto const begin = xml.find(open, at);
  if (begin == std::string_view::npos) return std::nullopt;
  auto const end = xml.find(close, begin + open.size());
  if (end == std::string_view::npos) return std::nullopt;
  at = end + close.size();
  return xml.substr(begin + open.size(), end - begin - open.size());
}
/// The text of the first such element, without XML's escapes; empty if there is none.
template <class = Deferred>
std::string s3_text(std::string_view xml, std::string_view name) {
  std::size_t at = 0;
  std::string text{s3_element(xml, name, at).value_or("")};
  constexpr std::array<std::pair<std::string_view, char>, 6> escapes{{{"&lt;", '<'}, {"&gt;", '>'}, {"&quot;", '"'}, {"&#34;", '"'}, {"&apos;", '\''}, {"&amp;", '&'}}};   // the last one last
  for (auto const& [escape, character] : escapes)
    for (auto found = text.find(escape); found != std::string::npos; found = text.find(escape, found + 1)) text.replace(found, escape.size(), 1, character);
  return text;
}

}  // namespace dcp
