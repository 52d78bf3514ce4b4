// SPDX-License-Identifier: Apache-2.0
#pragma once
// libzstd, if the machine has it: found when it is first needed, so that nobody has to link it.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include <dlfcn.h>

// Part of the C library from glibc 2.34 on; a program of an older one that does not link libdl has none.
#pragma weak dlopen
#pragma weak dlsym

namespace dcp::detail {

/// The stable part of the library's interface.
/// Source    zstd.h 1.4 and later, "Streaming decompression"
class ZstdLibrary {
 public:
  /// Throws Error(unsupported) where it is not installed.
  template <class = Deferred>
  static ZstdLibrary const& get() {
    static ZstdLibrary const library;
    if (library.decompress_ == nullptr) throw Error{ErrorCode::unsupported, "a compressed item, and the library libzstd.so.1 is not there to read it"}.with_hint("install zstd (Debian: libzstd1)");
    return library;
  }

  /// All frames of `bytes`. Throws Error(corrupt), and Error(limit) for more than `most` bytes.
  template <class = Deferred>
  Bytes decompress(ConstByteSpan bytes, std::uint64_t most) const {
    struct Stream {
      ZstdLibrary const& library;
      void* stream;
      ~Stream() { library.free_(stream); }
    } const context{*this, create_()};
    if (context.stream == nullptr) throw Error{ErrorCode::io, "libzstd has no memory"};
    Bytes out;
    In in{bytes.data(), bytes.size(), 0};
    std::size_t rest = 1;
    while (in.at < in.size || rest != 0) {
      std::size_t const begin = out.size(), room = std::min<std::uint64_t>(std::max<std::size_t>(begin, 64 << 10), most + 1 - begin);
      out.resize(begin + room);
      Out target{out.data() + begin, room, 0};
      std::size_t const before = in.at;
      rest = decompress_(context.stream, &target, &in);
      if (is_error_(rest) != 0) throw Error{ErrorCode::corrupt, std::string{"a compressed item that cannot be decompressed: "} + error_name_(rest)};
      out.resize(begin + target.at);
      if (out.size() > most) throw Error{ErrorCode::limit, "a compressed item of more than " + std::to_string(most) + " bytes"};
      if (target.at == 0 && in.at == before) throw Error{ErrorCode::truncated, "a compressed item ends too early"};
    }
    return out;
  }

 private:
  struct In {
    void const* data;
    std::size_t size, at;
  };
  struct Out {
    void* data;
    std::size_t size, at;
  };

  template <class = Deferred>
  ZstdLibrary() {
    void* const handle = &::dlopen == nullptr || &::dlsym == nullptr ? nullptr : ::dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return;
    auto const find = [&](auto& function, char const* name) { function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(handle, name)); };
    find(create_, "ZSTD_createDStream");
    find(free_, "ZSTD_freeDStream");
    find(is_error_, "ZSTD_isError");
    find(error_name_, "ZSTD_getErrorName");
    find(decompress_, "ZSTD_decompressStream");
    if (create_ == nullptr || free_ == nullptr || is_error_ == nullptr || error_name_ == nullptr) decompress_ = nullptr;
  }

  void* (*create_)() = nullptr;
  std::size_t (*free_)(void*) = nullptr;
  unsigned (*is_error_)(std::size_t) = nullptr;
  char const* (*error_name_)(std::size_t) = nullptr;
  std::size_t (*decompress_)(void*, Out*, In*) = nullptr;
};

}  // namespace dcp::detail
