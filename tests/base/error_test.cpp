// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/error.hpp>

#include <doctest/doctest.h>

#include <cerrno>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

using namespace dcp;

static_assert(std::is_nothrow_copy_constructible_v<Error>);   // copying an exception must not throw

TEST_CASE("error codes: every one has its own name") {
  std::set<std::string_view> names(error_code_names.begin(), error_code_names.end());
  CHECK(names.size() == error_code_names.size());
  // The list of names follows the list of codes.
  CHECK(to_string(ErrorCode::unknown) == "unknown");
  CHECK(to_string(ErrorCode::rank_failed) == "rank_failed");
  CHECK(to_string(ErrorCode::kind_mismatch) == "kind_mismatch");
  CHECK(to_string(ErrorCode::budget) == "budget");
  CHECK(to_string(ErrorCode::bad_utf8) == "bad_utf8");
  CHECK(to_string(ErrorCode::overflow) == "overflow");
  CHECK(to_string(ErrorCode::trailing_data) == "trailing_data");
  CHECK(to_string(ErrorCode::index_mismatch) == "index_mismatch");
  CHECK(to_string(ErrorCode::limit) == "limit");
}

TEST_CASE("Error: the message first, then one line per fact that is known") {
  Error error{ErrorCode::corrupt, "w: the checksum differs"};
  CHECK(std::string_view{error.what()} == "dcp: w: the checksum differs\n  code      corrupt");
  error.with_rank(17, 32, "dp 4, tp 1").with_phase("load: read").with_path("ckpt/f").with_range(10, 20).with_errno(ENOENT).with_hint("copy it again");
  CHECK(std::string_view{error.what()} ==
        "dcp: w: the checksum differs\n  code      corrupt\n  rank      17 of 32 (dp 4, tp 1); the other 31 ranks stopped with it\n  during    load: read\n  file      ckpt/f, bytes [10, 20)\n"
        "  system    No such file or directory (errno 2)\n  hint      copy it again");
  CHECK(error.rank() == 17);
  CHECK(error.system_error() == ENOENT);
}

TEST_CASE("Error: with two ranks one stopped, alone nobody else did") {
  CHECK(std::string_view{Error{ErrorCode::io, "x"}.with_rank(1, 2).what()}.find("; the other rank stopped with it") != std::string_view::npos);
  CHECK(std::string_view{Error{ErrorCode::io, "x"}.with_rank(0, 1).what()}.find("stopped") == std::string_view::npos);
}

TEST_CASE("Error: the first to say a fact is right, later ones are not heard") {
  Error error{ErrorCode::io, "x"};
  error.with_rank(1, 2).with_rank(0, 2).with_phase("a").with_phase("b").with_path("p").with_path("q").with_range(1, 2).with_range(3, 4).with_errno(5).with_errno(6).with_hint("h").with_hint("i");
  CHECK(error.rank() == 1);
  CHECK(error.phase() == "a");
  CHECK(error.path() == "p");
  CHECK(error.system_error() == 5);
  CHECK(error.hint() == "h");
  CHECK(std::string_view{error.what()}.find("[1, 2)") != std::string_view::npos);
}

TEST_CASE("Error: a copy is not changed by facts that are added to the original") {
  Error error{ErrorCode::io, "x"};
  Error const copy = error;
  error.with_path("p");
  CHECK(copy.path().empty());
  CHECK(std::string_view{copy.what()}.find("file") == std::string_view::npos);
}

TEST_CASE("Error: travels between ranks with all its facts") {
  Error error{ErrorCode::shape_mismatch, "w: \xE2\x82\xAC\n  also"};
  error.with_rank(3, 4, "note").with_phase("p").with_path("f").with_range(1, 9).with_errno(7).with_hint("h");
  Error const again = Error::decode(error.encode());
  CHECK(std::string_view{again.what()} == error.what());
  CHECK(again.code() == error.code());
  CHECK(again.message() == error.message());
  CHECK(again.encode() == error.encode());
}

TEST_CASE("Error: damaged bytes decode to some error") {
  Bytes bytes = Error{ErrorCode::limit, "message"}.encode();
  bytes[0] = std::byte{0xFF};
  CHECK(Error::decode(bytes).code() == ErrorCode::unknown);
  CHECK(Error::decode(bytes).message() == "message");
  CHECK(Error::decode(ConstByteSpan{}).message().empty());
}

TEST_CASE("current_error: any exception becomes an Error") {
  auto const caught = [](auto thrown) {
    try {
      throw thrown;
    } catch (...) {
      return current_error();
    }
  };
  CHECK(caught(Error{ErrorCode::timeout, "t"}).code() == ErrorCode::timeout);
  CHECK(caught(std::bad_alloc{}).code() == ErrorCode::budget);
  CHECK(caught(std::runtime_error{"why"}).code() == ErrorCode::unknown);
  CHECK(caught(std::runtime_error{"why"}).message() == "why");
  CHECK(caught(5).code() == ErrorCode::unknown);
}
