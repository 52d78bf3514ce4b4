// SPDX-License-Identifier: Apache-2.0
#pragma once
// The file system, written through io_uring: as LocalFs in all but the number of writes that a thread has under way. Component dcp::uring.

#include <dcp/base/config.hpp>
#include <dcp/io/uring.hpp>
#include <dcp/media/local_fs.hpp>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace dcp {

namespace detail {

/// Writes by a ring, and by plain calls where the ring fails: from then on, or just for a write that it did not finish. What the file
/// system refuses (no space, a broken device) is an error either way. `Ring`: Uring, or what a test puts in its place.
template <class Ring>
class UringQueue final : public WriteQueue {
 public:
  UringQueue(std::unique_ptr<Ring> ring, std::size_t depth) : ring_{std::move(ring)}, writes_(depth) {}
  ~UringQueue() override {
    // The kernel reads memory that is about to go.
    while (flying_ > 0) {
      typename Ring::Ended ended{};
      if (ring_->wait(ended) != 0) break;
      if (ended.id < writes_.size()) --flying_;
    }
  }

  std::size_t depth() const override { return writes_.size(); }
  void begin(WritableFile& file, std::uint64_t offset, ConstByteSpan bytes, std::size_t id) override {
    writes_[id] = {&file, offset, bytes};
    constexpr std::uint64_t unit = 4096;   // an end inside a block is for the file to arrange
    int const descriptor = offset % unit == 0 && bytes.size() % unit == 0 && bytes.size() <= most_bytes ? file.descriptor() : -1;
    if (works_ && descriptor >= 0) {
      if (ring_->write(descriptor, offset, bytes, id) == 0) {
        ++flying_;
        return;
      }
      works_ = false;
    }
    ended_.push_back({id, plainly(id)});
  }
  Ended wait() override {
    if (!ended_.empty()) {
      Ended const ended = ended_.back();
      ended_.pop_back();
      return ended;
    }
    typename Ring::Ended ended{};
    do {
      if (int const failure = ring_->wait(ended); failure != 0) throw system_failure(failure, "io_uring does not say what became of a write", "");
    } while (ended.id >= writes_.size());
    --flying_;
    Write const& write = writes_[ended.id];
    if (ended.result == static_cast<std::int64_t>(write.bytes.size())) return {ended.id, nullptr};
    // A file system that takes no such writes, an interruption, a part: all of it once more, by a plain call, which tells what is wrong.
    if (ended.result == -EINVAL || ended.result == -EOPNOTSUPP || ended.result == -ENOSYS) works_ = false;
    bool const again = ended.result >= 0 || !works_ || ended.result == -EINTR || ended.result == -EAGAIN;
    if (again) return {ended.id, plainly(ended.id)};
    return {ended.id, std::make_exception_ptr(system_failure(-ended.result, "cannot write the file", ""))};
  }

 private:
  static constexpr std::uint64_t most_bytes = std::uint64_t{1} << 30;
  struct Write {
    WritableFile* file = nullptr;
    std::uint64_t offset = 0;
    ConstByteSpan bytes;
  };

  std::exception_ptr plainly(std::size_t id) const {
    try {
      writes_[id].file->write_at(writes_[id].offset, writes_[id].bytes);
      return nullptr;
    } catch (...) {
      return std::current_exception();
    }
  }

  std::unique_ptr<Ring> ring_;
  std::vector<Write> writes_;
  std::vector<Ended> ended_;      // without the ring
  std::size_t flying_ = 0;        // in the ring
  bool works_ = true;
};

}  // namespace detail

/// Models Medium: LocalFs, with several writes of a thread under way at once where the kernel has io_uring, as LocalFs where it has not.
///
/// Example   dcp::save<dcp::BasicSafeTensors<dcp::UringFs>>(world, "ckpt/step-100", state);
class UringFs : public LocalFs {
 public:
  using LocalFs::LocalFs;

  /// Nothing where there is no io_uring.
  template <class D = Deferred>
  std::unique_ptr<WriteQueue> open_queue(std::size_t depth) {
    auto ring = Uring<D>::open(static_cast<unsigned>(depth));
    if (!ring) return nullptr;
    return std::make_unique<detail::UringQueue<Uring<D>>>(std::move(ring), depth);
  }
};

}  // namespace dcp
