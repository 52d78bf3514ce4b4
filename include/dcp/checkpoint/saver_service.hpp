// SPDX-License-Identifier: Apache-2.0
#pragma once
// The program dcp-saver, but for its main(): examples/dcp-saver.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/background.hpp>
#include <dcp/checkpoint/save_job.hpp>
#include <dcp/checkpoint/saver.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/media/medium.hpp>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <dirent.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

namespace dcp {

namespace detail {

/// Closes what the program that started this one has left open, but for the descriptors up to `last`.
template <class = Deferred>
void close_descriptors_above(int last) {
  DIR* const directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) return;
  std::vector<int> open;
  while (auto const* entry = ::readdir(directory))
    if (int const number = std::atoi(entry->d_name); number > last && number != ::dirfd(directory)) open.push_back(number);
  ::closedir(directory);
  for (int const number : open) ::close(number);
}

template <class = Deferred>
class SaverService {
 public:
  /// `memory`: `bytes` of it, which the pieces lie in
  SaverService(int socket, std::byte const* memory, std::uint64_t bytes) : link_{socket}, memory_{memory}, bytes_{bytes} {}
  ~SaverService() { end_current(); }

  /// Until the other end has closed, and what it gave whole has ended.
  void serve() {
    say(SaverWord::hello, as_byte_span(saver_version()));
    bool there = true;
    while (there) {
      pollfd wait{link_.descriptor(), POLLIN, 0};
      {
        std::lock_guard const lock{mutex_};
        link_.flush();
        if (link_.has_unsent()) wait.events |= POLLOUT;
      }
      ::poll(&wait, 1, current_ && !told_ ? 10 : -1);
      there = link_.listen([this](SaverWord word, ConstByteSpan body) { hear(word, ByteReader{body}); });
      tell();
    }
    if (!current_) return;
    // Nobody will send the rest of a copy.
    if (!staged_) {
      current_->staging_ended(std::make_exception_ptr(Error{ErrorCode::cancelled, "the program ended before its state had been copied"}));
      current_->interrupt(Interruption::Why::cancelled);
    }
  }

 private:
  void hear(SaverWord word, ByteReader in) {
    if (word == SaverWord::save) return begin(in.rest());
    if (!current_) return;
    switch (word) {
      case SaverWord::piece: {
        auto const file = in.number<std::uint32_t>();
        auto const position = in.number<std::uint64_t>(), offset = in.number<std::uint64_t>(), size = in.number<std::uint64_t>(), number = in.number<std::uint64_t>();
        if (!in.ok() || offset > bytes_ || size > bytes_ - offset) return current_->staging_ended(std::make_exception_ptr(Error{ErrorCode::corrupt, "a damaged message about staging memory"}));
        // Only ever read: what was copied there is on its way to a file.
        ByteSpan const piece{const_cast<std::byte*>(memory_) + offset, static_cast<std::size_t>(size)};
        return current_->stage(file, position, {piece, {piece.data(), [this, number](std::byte*) { say(SaverWord::returned, ByteWriter{}.number(number).bytes()); }}});
      }
      case SaverWord::staged: staged_ = true; return current_->staging_ended(in.done() ? nullptr : std::make_exception_ptr(Error::decode(in.rest())));
      case SaverWord::interrupt: return current_->interrupt(in.number<Interruption::Why>());
      case SaverWord::forget:
        if (told_) current_->forget_attempt();
        return say(SaverWord::forgotten, {});
      default: return;
    }
  }
  void begin(ConstByteSpan message) {
    end_current();
    SaveJob job;
    try {
      job = decode_job(message);
    } catch (Error const& error) {
      return say(SaverWord::ended, ByteWriter{}.block(error.encode()).block({}).bytes());
    }
    job.medium = std::make_shared<MediumModel<LocalFs>>(LocalFs{});
    job.events = [this](SaveEvent const& event) {
      if (event.kind == SaveEvent::Kind::written || event.kind == SaveEvent::Kind::retired) say(SaverWord::event, encode(event));
    };
    staged_ = told_ = false, moves_ = 0;
    current_ = std::make_unique<BackgroundSave<>>(std::move(job));
    thread_ = Thread{[save = current_.get()] { save->run(); }};
  }
  void tell() {
    if (!current_ || told_) return;
    std::uint64_t const moves = current_->moves();
    if (auto const more = moves - std::exchange(moves_, moves); more > 0) say(SaverWord::moved, ByteWriter{}.number(more).bytes());
    if (!current_->wait_for(std::chrono::milliseconds{0})) return;
    told_ = true;
    Bytes error;
    if (auto const failure = current_->failure()) {
      try {
        std::rethrow_exception(failure);
      } catch (...) {
        error = current_error().encode();
      }
    }
    ByteWriter words;
    words.block(error).block(current_->watch().encode());
    for (auto const& warning : current_->warnings()) words.text(warning);
    say(SaverWord::ended, words.bytes());
  }
  void end_current() {
    if (thread_.joinable()) thread_.join();
    current_.reset();
  }
  // From any thread.
  void say(SaverWord word, ConstByteSpan body) {
    std::lock_guard const lock{mutex_};
    link_.say(word, body);
    link_.flush();
  }

  Mutex mutex_;   // of what is said
  SaverLink<> link_;
  std::byte const* memory_;
  std::uint64_t bytes_;
  bool staged_ = false, told_ = false;
  std::uint64_t moves_ = 0;
  std::unique_ptr<BackgroundSave<>> current_;
  Thread thread_;
};

}  // namespace detail

/// What the program dcp-saver does: it finishes saves of the program that started it (Executor::process), also when that program is killed. Returns its exit
/// status: 2 if it was started by somebody else.
///
/// Ignores   SIGTERM, SIGINT and SIGHUP, which a job that is to end sends to all of its processes. It does not survive SIGKILL, nor the end of the job's cgroup
template <class = Deferred>
int run_saver(int argc, char** argv) {
  constexpr int socket = 3, shared = 4;
  char* end = nullptr;
  std::uint64_t const bytes = argc == 2 ? std::strtoull(argv[1], &end, 10) : 0;
  int type = 0;
  socklen_t size = sizeof type;
  if (bytes == 0 || *end != '\0' || ::getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size) != 0) return 2;
  detail::close_descriptors_above(shared);
#ifndef POSIX_SPAWN_SETSID
  ::setsid();
#endif
  for (int const signal : {SIGTERM, SIGINT, SIGHUP, SIGPIPE}) ::signal(signal, SIG_IGN);
  void* const memory = ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ, MAP_SHARED | MAP_NORESERVE, shared, 0);
  if (memory == MAP_FAILED) return 2;
  detail::SaverService<> service{socket, static_cast<std::byte const*>(memory), bytes};
  service.serve();
  return 0;
}

}  // namespace dcp
