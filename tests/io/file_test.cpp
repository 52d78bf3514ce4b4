// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/file.hpp>

#include "../support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include <sys/socket.h>
#include <sys/un.h>

using namespace dcp;
using dcp::test::TemporaryDirectory;

namespace {

Error error_of(auto action) {
  try {
    action();
  } catch (Error const& error) {
    return error;
  }
  FAIL("no Error was thrown");
  return Error{ErrorCode::unknown, ""};
}

std::string read_text(FileHandle const& file, std::uint64_t offset, std::size_t size) {
  std::string text(size, '\0');
  file.read_at(offset, std::as_writable_bytes(std::span{text}));
  return text;
}

}  // namespace

TEST_CASE("FileHandle: bytes come back from where they were written") {
  TemporaryDirectory directory;
  auto const path = directory / "f";
  auto writer = FileHandle::open_write(path);
  writer.write_at(3, as_byte_span("defg"));
  writer.write_at(0, as_byte_span("abc"));
  writer.write_at(0, {});
  writer.sync();
  writer.resize(6);
  CHECK(writer.size() == 6);
  writer.close();
  CHECK_FALSE(writer.is_open());
  auto const reader = FileHandle::open_read(path);
  CHECK(read_text(reader, 1, 5) == "bcdef");
  CHECK(reader.path() == path);
}

TEST_CASE("FileHandle: offsets beyond 4 GiB are exact, in a sparse file") {
  TemporaryDirectory directory;
  constexpr std::uint64_t far = (std::uint64_t{5} << 30) + 7;
  auto const writer = FileHandle::open_write(directory / "sparse");
  writer.write_at(far, as_byte_span("far"));
  auto const reader = FileHandle::open_read(directory / "sparse");
  CHECK(reader.size() == far + 3);
  CHECK(read_text(reader, far - 1, 4) == std::string("\0far", 4));
}

TEST_CASE("FileHandle: a descriptor has one owner and is closed on exec") {
  TemporaryDirectory directory;
  auto first = FileHandle::open_write(directory / "f");
  int const descriptor = first.descriptor();
  CHECK((::fcntl(descriptor, F_GETFD) & FD_CLOEXEC) != 0);
  {
    FileHandle second{std::move(first)};
    CHECK_FALSE(first.is_open());
    CHECK(second.descriptor() == descriptor);
    first = std::move(second);
    CHECK(first.descriptor() == descriptor);
    first = FileHandle{};
  }
  CHECK(::fcntl(descriptor, F_GETFD) == -1);
}

TEST_CASE("FileHandle: a read past the end is truncated and names file, range and what is missing") {
  TemporaryDirectory directory;
  FileHandle::open_write(directory / "f").write_at(0, as_byte_span("0123456789"));
  auto const reader = FileHandle::open_read(directory / "f");
  auto const error = error_of([&] { read_text(reader, 8, 5); });
  CHECK(error.code() == ErrorCode::truncated);
  CHECK(error.path() == directory / "f");
  CHECK(std::strstr(error.what(), "bytes [8, 13)") != nullptr);
  CHECK(std::strstr(error.what(), "ends 3 bytes before") != nullptr);
  CHECK(error_of([&] { read_text(reader, ~std::uint64_t{0}, 5); }).code() == ErrorCode::truncated);
}

TEST_CASE("FileHandle: a full device is io with ENOSPC, path and range") {
  auto const full = FileHandle::open_write("/dev/full");
  auto const error = error_of([&] { full.write_at(4, as_byte_span("data")); });
  CHECK(error.code() == ErrorCode::io);
  CHECK(error.system_error() == ENOSPC);
  CHECK(error.path() == "/dev/full");
  CHECK(std::strstr(error.what(), "bytes [4, 8)") != nullptr);
}

TEST_CASE("FileHandle: what cannot be opened says why") {
  TemporaryDirectory directory;
  auto const missing = error_of([&] { FileHandle::open_read(directory / "no"); });
  CHECK(missing.code() == ErrorCode::missing_file);
  CHECK(missing.system_error() == ENOENT);
  CHECK(missing.path() == directory / "no");
  CHECK(error_of([&] { FileHandle::open_write(directory / "no/f"); }).code() == ErrorCode::missing_file);
  CHECK(error_of([&] { FileHandle::open_directory(directory / "no"); }).code() == ErrorCode::missing_file);
  FileHandle::open_write(directory / "f");
  CHECK(error_of([&] { FileHandle::open_directory(directory / "f"); }).system_error() == ENOTDIR);
  CHECK(error_of([&] { FileHandle::open_read(directory / "f/x"); }).system_error() == ENOTDIR);
  CHECK(error_of([&] { FileHandle{}.sync(); }).system_error() == EBADF);
}

TEST_CASE("FileHandle: only regular files are read, and nothing is waited for") {
  TemporaryDirectory directory;
  REQUIRE(::mkfifo((directory / "fifo").c_str(), 0600) == 0);
  CHECK(error_of([&] { FileHandle::open_read(directory / "fifo"); }).code() == ErrorCode::io);
  CHECK(error_of([&] { FileHandle::open_write(directory / "fifo"); }).system_error() == ENXIO);
  CHECK(error_of([&] { FileHandle::open_read("/dev/zero"); }).code() == ErrorCode::io);
  CHECK(error_of([&] { FileHandle::open_read(directory.path()); }).system_error() == EISDIR);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, (directory / "s").c_str(), sizeof address.sun_path - 1);
  FileHandle const socket{::socket(AF_UNIX, SOCK_STREAM, 0), ""};
  REQUIRE(::bind(socket.descriptor(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  CHECK(error_of([&] { FileHandle::open_read(directory / "s"); }).code() == ErrorCode::io);
}

TEST_CASE("FileHandle: open_write creates, keeps what is there, and respects the umask") {
  TemporaryDirectory directory;
  FileHandle::open_write(directory / "f").write_at(0, as_byte_span("kept"));
  FileHandle::open_write(directory / "f").write_at(0, as_byte_span("K"));
  CHECK(read_text(FileHandle::open_read(directory / "f"), 0, 4) == "Kept");
  auto const mask = ::umask(0);
  ::umask(mask);
  CHECK((FileHandle::open_read(directory / "f").status().st_mode & 0777) == (0666 & ~mask));
}

TEST_CASE("FileHandle: files are opened relative to a directory, also after it is renamed") {
  TemporaryDirectory directory;
  REQUIRE(::mkdir((directory / "d").c_str(), 0700) == 0);
  auto const handle = FileHandle::open_directory(directory / "d");
  REQUIRE(std::rename((directory / "d").c_str(), (directory / "e").c_str()) == 0);
  FileHandle::open_at(handle, "f", O_WRONLY | O_CREAT).write_at(0, as_byte_span("x"));
  handle.sync_directory();
  CHECK(FileHandle::open_read(directory / "e/f").size() == 1);
  CHECK(error_of([&] { FileHandle::open_at(handle, "no", O_RDONLY); }).path() == directory / "d/no");
}

TEST_CASE("law: short counts and interruptions move the same bytes as whole transfers") {
  auto const seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937_64 random{seed};
  for (int round = 0; round < 200; ++round) {
    std::string source(random() % 5000, '\0'), target(source.size(), '\0');
    for (auto& c : source) c = static_cast<char>(random());
    int interruptions = 0;
    auto const result = detail::move_all(source.size(), [&](std::uint64_t done, std::size_t most) -> ssize_t {
      if (random() % 3 == 0) return ++interruptions, errno = EINTR, -1;
      auto const count = std::min<std::size_t>(most, 1 + random() % 700);
      std::memcpy(target.data() + done, source.data() + done, count);
      return static_cast<ssize_t>(count);
    });
    REQUIRE(result.done == source.size());
    REQUIRE(result.system_error == 0);
    REQUIRE(target == source);
  }
}

TEST_CASE("move_all: stops at the end and at an error, and says how far it came") {
  int calls = 0;
  auto const end = detail::move_all(10, [&](std::uint64_t, std::size_t) -> ssize_t { return ++calls == 1 ? 4 : 0; });
  CHECK(end.done == 4);
  CHECK(end.system_error == 0);
  calls = 0;
  auto const error = detail::move_all(10, [&](std::uint64_t, std::size_t) -> ssize_t { return ++calls == 1 ? 4 : (errno = EIO, -1); });
  CHECK(error.done == 4);
  CHECK(error.system_error == EIO);
  detail::move_all(std::uint64_t{3} << 30, [&](std::uint64_t, std::size_t most) -> ssize_t {
    CHECK(most <= 0x7ffff000);
    return static_cast<ssize_t>(most);
  });
}

TEST_CASE("retry_visible: waits for what appears, not for what is wrong") {
  TemporaryDirectory directory;
  using namespace std::chrono_literals;
  std::thread maker{[&] {
    std::this_thread::sleep_for(30ms);
    FileHandle::open_write(directory / "late").write_at(0, as_byte_span("x"));
  }};
  auto const file = retry_visible(20s, [&] { return FileHandle::open_read(directory / "late"); });
  CHECK(file.is_open());
  maker.join();

  int calls = 0;
  auto const fails_with = [&](ErrorCode code, int system_error) {
    return [&calls, code, system_error]() -> int {
      ++calls;
      throw Error{code, "x"}.with_errno(system_error);
    };
  };
  auto const begin = std::chrono::steady_clock::now();
  CHECK(error_of([&] { retry_visible(20ms, fails_with(ErrorCode::missing_file, ENOENT)); }).code() == ErrorCode::missing_file);
  CHECK(std::chrono::steady_clock::now() - begin >= 20ms);
  CHECK(calls > 1);
  calls = 0;
  CHECK(error_of([&] { retry_visible(20ms, fails_with(ErrorCode::io, ESTALE)); }).system_error() == ESTALE);
  CHECK(calls > 1);
  calls = 0;
  CHECK(error_of([&] { retry_visible(1h, fails_with(ErrorCode::io, EACCES)); }).system_error() == EACCES);
  CHECK(error_of([&] { retry_visible(0ms, fails_with(ErrorCode::missing_file, ENOENT)); }).system_error() == ENOENT);
  CHECK(calls == 2);
}

TEST_CASE("parent_path and path_name split a path at its last component") {
  CHECK(parent_path("a/b") == "a");
  CHECK(parent_path("a//b//") == "a");
  CHECK(parent_path("a") == ".");
  CHECK(parent_path("/a") == "/");
  CHECK(parent_path("/") == "/");
  CHECK(parent_path(".") == ".");
  CHECK(path_name("a/b") == "b");
  CHECK(path_name("a/b//") == "b");
  CHECK(path_name("a") == "a");
  CHECK(path_name("/") == "");
}
