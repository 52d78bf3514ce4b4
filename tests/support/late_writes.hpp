// SPDX-License-Identifier: Apache-2.0
#pragma once
// A medium with a queue of writes that are done late, the newest first: what a kernel's queue may do, on every machine and over any medium.

#include <dcp/media/medium.hpp>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

namespace dcp::test {

class LateQueue final : public WriteQueue {
 public:
  explicit LateQueue(std::size_t depth) : depth_{depth} {}

  std::size_t depth() const override { return depth_; }
  void begin(WritableFile& file, std::uint64_t offset, ConstByteSpan bytes, std::size_t id) override { writes_.push_back({&file, offset, bytes, id}); }
  Ended wait() override {
    Write const write = writes_.back();
    writes_.pop_back();
    try {
      write.file->write_at(write.offset, write.bytes);
    } catch (...) {
      return {write.id, std::current_exception()};
    }
    return {write.id, nullptr};
  }

 private:
  struct Write {
    WritableFile* file;
    std::uint64_t offset;
    ConstByteSpan bytes;
    std::size_t id;
  };
  std::size_t depth_;
  std::vector<Write> writes_;
};

/// Models Medium. M with writes that nobody has done before somebody waits for them.
template <Medium M>
class LateWrites : public M {
 public:
  using M::M;
  explicit LateWrites(M inner) : M{std::move(inner)} {}
  std::unique_ptr<WriteQueue> open_queue(std::size_t depth) { return std::make_unique<LateQueue>(depth); }
};

}  // namespace dcp::test
