// SPDX-License-Identifier: Apache-2.0
#pragma once
// An object store that speaks S3, as a medium. Component dcp::s3.
//
// A path is "/bucket/key". What a save relies on (media/medium.hpp, facts 5 to 7) is what Amazon S3 has promised since 2020 and 2024: reads and lists
// that show every finished write, and puts on condition (If-None-Match, If-Match). A store that answers to a condition as if it were not
// there is found out by the first lease, and refused.
//
// A file is put in one request, or, above part_bytes, uploaded in parts as they fill, each by the thread that brings its last byte: threads of a save are
// uploads under way. It has one writer, so ranks that hold parts of a file send them to the one that writes it: with many ranks have at least as many
// files as ranks (max_file_bytes), or a layout with a file per rank (FileLayout::sharded).

#include <dcp/base/bytes.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/io/s3_client.hpp>
#include <dcp/io/s3_sign.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/media/memory.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <unistd.h>

namespace dcp {

namespace detail {

struct S3Name {
  std::string bucket, key;   // the key is empty for the bucket itself

  template <class = Deferred>
  static S3Name of(std::string const& path) {
    auto const components = memory_path(path);
    S3Name name;
    for (std::size_t i = 0; i < components.size(); ++i) (i == 0 ? name.bucket : name.key) += (i > 1 ? "/" : "") + components[i];
    return name;
  }
  std::string prefix() const { return key.empty() ? key : key + '/'; }
};

/// The checksum as the store writes it: base64 of its bytes, the highest first.
template <class = Deferred>
std::string s3_checksum(std::uint64_t crc) {
  std::array<std::byte, 8> bytes{};
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(crc >> (56 - 8 * i));
  return s3_base64(bytes);
}

/// The requests of a store, by name.
template <class = Deferred>
class S3Store {
 public:
  explicit S3Store(S3Options options) : client_{std::move(options)} {}

  S3Options const& options() const { return client_.options(); }

  struct Found {
    std::string etag;
    std::uint64_t size = 0;
    std::string bytes;              // of get
    std::chrono::seconds age{0};    // since the last change, by the store's clock
  };
  /// Nothing if there is no such object.
  std::optional<Found> head(S3Name const& name) {
    auto const response = client_.perform({.method = "HEAD", .bucket = name.bucket, .key = name.key});
    if (response.status == 404) return std::nullopt;
    if (response.status != 200) {
      // The answer to a HEAD has no body, which would say why.
      typename S3Client<>::Call const call{.method = "GET", .bucket = name.bucket, .key = name.key, .headers = {{"range", "bytes=0-0"}}};
      auto const said = client_.perform(call);
      throw client_.refusal(call, said.status == response.status ? said : response);
    }
    return found(response, std::strtoull(response.header("content-length").c_str(), nullptr, 10));
  }
  std::optional<Found> get(S3Name const& name, bool urgent = false) {
    auto response = client_.perform({.method = "GET", .bucket = name.bucket, .key = name.key, .urgent = urgent});
    if (response.status != 200) {
      Error const refusal = client_.refusal({.method = "GET", .bucket = name.bucket, .key = name.key}, response);
      if (refusal.code() == ErrorCode::missing_file) return std::nullopt;
      throw refusal;
    }
    return found(response, response.body.size(), std::move(response.body));
  }
  void get_range(S3Name const& name, std::string const& etag, std::uint64_t begin, std::span<ByteSpan const> pieces) {
    std::uint64_t size = 0;
    for (auto const piece : pieces) size += piece.size();
    typename S3Client<>::Call call{.method = "GET", .bucket = name.bucket, .key = name.key};
    call.headers = {{"range", "bytes=" + std::to_string(begin) + '-' + std::to_string(begin + size - 1)}, {"if-match", etag}};
    call.sink.assign(pieces.begin(), pieces.end());
    auto const response = client_.expect(call, {200, 206});
    if (response.status == 206) return;
    // A store that knows no ranges, or finds that all of the object was asked for.
    if (begin > response.body.size() || size > response.body.size() - begin) throw client_.refusal(call, response);
    std::size_t at = static_cast<std::size_t>(begin);
    for (auto const piece : pieces) {
      auto const bytes = as_byte_span(std::string_view{response.body}.substr(at, piece.size()));
      std::copy(bytes.begin(), bytes.end(), piece.begin());
      at += piece.size();
    }
  }

  /// `condition`: a header of it. Nothing if it does not hold and something else is there than these bytes; else their ETag.
  std::optional<std::string> put(S3Name const& name, ConstByteSpan bytes, S3Request::Fields condition = {}, bool urgent = false) {
    typename S3Client<>::Call call{.method = "PUT", .bucket = name.bucket, .key = name.key, .body = bytes, .urgent = urgent};
    call.conflicts = !condition.empty();
    call.headers = std::move(condition);
    if (options().checksums) call.headers.emplace_back("x-amz-checksum-crc64nvme", s3_checksum(crc64(bytes)));
    auto const response = call.conflicts ? client_.perform(call) : client_.expect(call, {200});
    if (response.status == 200) return response.header("etag");
    if (!call.conflicts || (response.status != 412 && response.status != 404)) throw client_.refusal(call, response);
    Error const refusal = client_.refusal(call, response);
    if (response.status == 404 && refusal.code() != ErrorCode::missing_file) throw refusal;   // no such bucket
    // Perhaps of an earlier attempt whose answer was lost; libcurl, too, sends a request again when a connection that it kept turns out to be dead.
    if (auto const now = get(name, urgent); now && std::ranges::equal(as_byte_span(now->bytes), bytes)) return now->etag;
    return std::nullopt;
  }
  void remove(S3Name const& name) { client_.expect({.method = "DELETE", .bucket = name.bucket, .key = name.key}, {200, 204, 404}); }

  /// entry(key, size) for every object below `prefix`, and with `levels` entry(prefix up to a '/', nothing) for those further down.
  template <class Entry>
  void list(std::string const& bucket, std::string const& prefix, bool levels, Entry entry, int most = 0) {
    std::string more;
    do {
      typename S3Client<>::Call call{.method = "GET", .bucket = bucket};
      call.query = {{"list-type", "2"}, {"prefix", prefix}, {"encoding-type", "url"}};
      if (levels) call.query.emplace_back("delimiter", "/");
      if (!more.empty()) call.query.emplace_back("continuation-token", more);
      if (most > 0) call.query.emplace_back("max-keys", std::to_string(most));
      std::string const xml = client_.expect(call, {200}).body;
      std::size_t at = 0;
      for (std::optional<std::string_view> one; (one = s3_element(xml, "Contents", at));) entry(s3_decoded(s3_text(*one, "Key")), std::optional<std::uint64_t>{std::strtoull(s3_text(*one, "Size").c_str(), nullptr, 10)});
      at = 0;
      for (std::optional<std::string_view> one; (one = s3_element(xml, "CommonPrefixes", at));) entry(s3_decoded(s3_text(*one, "Prefix")), std::optional<std::uint64_t>{});
      more = s3_text(xml, "IsTruncated") == "true" && most == 0 ? s3_text(xml, "NextContinuationToken") : "";
    } while (!more.empty());
  }

  // Uploads in parts.
  std::string begin_upload(S3Name const& name) {
    typename S3Client<>::Call call{.method = "POST", .bucket = name.bucket, .key = name.key, .query = {{"uploads", ""}}};
    if (options().checksums) call.headers = {{"x-amz-checksum-algorithm", "CRC64NVME"}, {"x-amz-checksum-type", "FULL_OBJECT"}};
    std::string id = s3_text(client_.expect(call, {200}).body, "UploadId");
    if (id.empty()) throw Error{ErrorCode::io, "the object store begins an upload without a name"}.with_path('/' + name.bucket + '/' + name.key);
    return id;
  }
  /// The ETag of the part.
  std::string put_part(S3Name const& name, std::string const& upload, std::uint64_t number, ConstByteSpan bytes, std::uint64_t crc) {
    typename S3Client<>::Call call{.method = "PUT", .bucket = name.bucket, .key = name.key, .query = {{"partNumber", std::to_string(number)}, {"uploadId", upload}}, .body = bytes};
    if (options().checksums) call.headers = {{"x-amz-checksum-crc64nvme", s3_checksum(crc)}};
    return client_.expect(call, {200}).header("etag");
  }
  void end_upload(S3Name const& name, std::string const& upload, std::vector<std::string> const& etags, std::uint64_t size, std::uint64_t crc) {
    std::string xml = "<CompleteMultipartUpload>";
    for (std::size_t i = 0; i < etags.size(); ++i) xml += "<Part><PartNumber>" + std::to_string(i + 1) + "</PartNumber><ETag>" + etags[i] + "</ETag></Part>";
    xml += "</CompleteMultipartUpload>";
    typename S3Client<>::Call call{.method = "POST", .bucket = name.bucket, .key = name.key, .query = {{"uploadId", upload}}, .body = as_byte_span(xml)};
    if (options().checksums) call.headers = {{"x-amz-checksum-crc64nvme", s3_checksum(crc)}, {"x-amz-checksum-type", "FULL_OBJECT"}};
    // It may begin to answer 200 before it knows, and then say in the body that it failed.
    for (int attempt = 1;; ++attempt) {
      auto const response = client_.perform(call);
      bool const done = response.status == 200 && response.body.find("<Error>") == std::string::npos;
      if (done) return;
      // Or an attempt did it, and its answer was lost.
      if (response.status == 404)
        if (auto const there = head(name); there && there->size == size) return;
      if (response.status != 200 || attempt == 3) throw client_.refusal(call, response);
    }
  }
  void abort_upload(S3Name const& name, std::string const& upload) {
    client_.expect({.method = "DELETE", .bucket = name.bucket, .key = name.key, .query = {{"uploadId", upload}}}, {200, 204, 404});
  }
  /// Uploads that somebody has begun below `prefix` and will not end. Their parts are paid for.
  void abort_uploads(std::string const& bucket, std::string const& prefix) {
    for (bool more = true; more;) {
      std::string const xml = client_.expect({.method = "GET", .bucket = bucket, .query = {{"uploads", ""}, {"prefix", prefix}}}, {200}).body;
      more = false;
      std::size_t at = 0;
      for (std::optional<std::string_view> one; (one = s3_element(xml, "Upload", at));) {
        std::string const key = s3_text(*one, "Key");
        if (!key.starts_with(prefix)) continue;   // some stores take no prefix here
        abort_upload({bucket, key}, s3_text(*one, "UploadId"));
        more = s3_text(xml, "IsTruncated") == "true";
      }
    }
  }

  /// Whether conditions are heeded is seen where one cannot hold: `there`, where something else is than `bytes`.
  void require_conditions(S3Name const& there, ConstByteSpan bytes) {
    if (conditions_) return;
    if (put(there, bytes, {{"if-none-match", "*"}}, true))
      throw Error{ErrorCode::unsupported, "this object store puts an object over another although it was told not to (If-None-Match)"}.with_path('/' + there.bucket + '/' + there.key);
    conditions_ = true;
  }

 private:
  static Found found(S3Response const& response, std::uint64_t size, std::string bytes = {}) {
    Found result{response.header("etag"), size, std::move(bytes), {}};
    std::time_t const changed = ::curl_getdate(response.header("last-modified").c_str(), nullptr), now = ::curl_getdate(response.header("date").c_str(), nullptr);
    if (changed >= 0 && now > changed) result.age = std::chrono::seconds{now - changed};
    return result;
  }

  S3Client<> client_;
  Atomic<bool> conditions_{false};
};
using S3StorePtr = std::shared_ptr<S3Store<>>;

template <class = Deferred>
class ObjectWritableFile final : public WritableFile {
 public:
  ObjectWritableFile(S3StorePtr store, std::string path) : store_{std::move(store)}, path_{std::move(path)}, name_{S3Name::of(path_)} {}
  ~ObjectWritableFile() override {
    if (upload_.empty()) return;
    try {
      store_->abort_upload(name_, upload_);
    } catch (...) {
      // The next save removes it with the attempt.
    }
  }

  void write_at(std::uint64_t offset, ConstByteSpan bytes) override {
    std::uint64_t const part = part_bytes();
    std::uint64_t end = 0;
    if (!checked_add(offset, bytes.size(), end) || end > part * S3Client<>::most_parts) throw too_large(end);
    while (!bytes.empty()) {
      std::uint64_t const number = offset / part, within = offset % part;
      auto const here = bytes.first(static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), part - within)));
      std::optional<Bytes> full = place(number, within, here);
      if (full) send(number, *full);
      bytes = bytes.subspan(here.size()), offset += here.size();
    }
  }
  void resize(std::uint64_t size) override {
    std::lock_guard const lock{mutex_};
    require_open();
    if (size > part_bytes() * S3Client<>::most_parts) throw too_large(size);
    if (size == size_ && declared_) return;
    if (!sent_.empty()) throw Error{ErrorCode::unsupported, "parts of the object are in the store already, and its size cannot change any more"}.with_path(path_);
    for (auto at = parts_.lower_bound(size / part_bytes()); at != parts_.end();) {
      std::uint64_t const begin = at->first * part_bytes();
      if (begin >= size) at = parts_.erase(at);
      else at->second.bytes.resize(static_cast<std::size_t>(std::min<std::uint64_t>(at->second.bytes.size(), size - begin))), ++at;
    }
    size_ = size, declared_ = true, put_ = false;
  }
  void sync() override {
    std::lock_guard const lock{mutex_};
    require_open();
    put();
  }
  void close() override {
    std::lock_guard const lock{mutex_};
    if (open_) put();
    open_ = false;
  }

 private:
  struct Part {
    Bytes bytes;
    std::uint64_t received = 0;
  };
  struct Sent {
    std::string etag;
    std::uint64_t crc = 0, size = 0;
  };

  std::uint64_t part_bytes() const { return store_->options().part_bytes; }
  void require_open() const {
    if (!open_) throw memory_failure(EBADF, path_);
  }
  Error too_large(std::uint64_t size) const {
    return memory_failure(EFBIG, path_).with_hint("an object of " + std::to_string(size) + " bytes has more than 10,000 parts of " + std::to_string(part_bytes()) + "; S3Options::part_bytes may be larger");
  }
  std::uint64_t size_of_part(std::uint64_t number) const { return std::min(part_bytes(), size_ - number * part_bytes()); }

  // The part, if these were the bytes that it lacked and it is one of several; each byte of such a file is written once.
  std::optional<Bytes> place(std::uint64_t number, std::uint64_t within, ConstByteSpan bytes) {
    std::lock_guard const lock{mutex_};
    require_open();
    if (sent_.contains(number)) throw Error{ErrorCode::unsupported, "this part of the object is in the store already"}.with_path(path_);
    std::uint64_t const end = number * part_bytes() + within + bytes.size();
    if (declared_ && end > size_ && !sent_.empty()) throw Error{ErrorCode::unsupported, "parts of the object are in the store already, and its size cannot change any more"}.with_path(path_);
    size_ = std::max(size_, end);
    put_ = false;
    Part& part = parts_[number];
    std::size_t const needed = static_cast<std::size_t>(declared_ ? size_of_part(number) : within + bytes.size());
    if (part.bytes.size() < needed) part.bytes.resize(needed);
    std::copy(bytes.begin(), bytes.end(), part.bytes.begin() + static_cast<std::ptrdiff_t>(within));
    part.received += bytes.size();
    if (!declared_ || size_ <= part_bytes() || part.received != size_of_part(number)) return std::nullopt;
    Bytes full = std::move(part.bytes);
    parts_.erase(number);
    sent_[number];
    if (upload_.empty()) upload_ = store_->begin_upload(name_);
    return full;
  }
  void send(std::uint64_t number, Bytes const& bytes) {
    std::uint64_t const crc = crc64(bytes);
    Sent sent{store_->put_part(name_, upload_, number + 1, bytes, crc), crc, bytes.size()};
    std::lock_guard const lock{mutex_};
    sent_[number] = std::move(sent);
  }
  // Called with the lock held, when no write is under way.
  void put() {
    if (put_) return;
    if (size_ <= part_bytes()) {
      Bytes bytes;
      if (!parts_.empty()) bytes = parts_.begin()->second.bytes;
      bytes.resize(static_cast<std::size_t>(size_));
      static_cast<void>(store_->put(name_, bytes));
      put_ = true;
      return;
    }
    if (upload_.empty()) upload_ = store_->begin_upload(name_);
    std::uint64_t const count = ceil_div(size_, part_bytes());
    std::vector<std::string> etags;
    std::uint64_t crc = 0;
    for (std::uint64_t number = 0; number < count; ++number) {
      auto sent = sent_.find(number);
      if (sent == sent_.end()) {   // with gaps as zeros
        Bytes bytes = std::move(parts_[number].bytes);
        parts_.erase(number);
        bytes.resize(static_cast<std::size_t>(size_of_part(number)));
        std::uint64_t const its = crc64(bytes);
        sent = sent_.insert({number, {store_->put_part(name_, upload_, number + 1, bytes, its), its, bytes.size()}}).first;
      }
      if (sent->second.etag.empty()) throw Error{ErrorCode::io, "a part of the object did not reach the store"}.with_path(path_);
      etags.push_back(sent->second.etag);
      crc = number == 0 ? sent->second.crc : crc64_combine(crc, sent->second.crc, sent->second.size);
    }
    store_->end_upload(name_, upload_, etags, size_, crc);
    upload_.clear();
    put_ = true;
  }

  S3StorePtr store_;
  std::string path_;
  S3Name name_;
  Mutex mutex_;
  std::map<std::uint64_t, Part> parts_;      // being filled
  std::map<std::uint64_t, Sent> sent_;       // in the store, or on their way
  std::string upload_;
  std::uint64_t size_ = 0;
  bool declared_ = false;                    // the size, before the first part was full
  bool open_ = true, put_ = false;
};

template <class = Deferred>
class ObjectReadableFile final : public ReadableFile {
 public:
  ObjectReadableFile(S3StorePtr store, std::string path) : store_{std::move(store)}, path_{std::move(path)}, name_{S3Name::of(path_)} {
    if (name_.key.empty()) throw memory_failure(EISDIR, path_);
    auto const there = store_->head(name_);
    if (!there) throw memory_failure(ENOENT, path_);
    etag_ = there->etag, size_ = there->size;
  }

  std::uint64_t size() const override { return size_; }
  std::uint64_t version() const override { return crc64(as_byte_span(etag_)) | 1; }
  void read_at(std::uint64_t offset, ByteSpan out) override { read_pieces(offset, std::span{&out, 1}); }
  void read_pieces(std::uint64_t offset, std::span<ByteSpan const> pieces) override {
    std::uint64_t size = 0;
    for (auto const piece : pieces) size += piece.size();
    if (size == 0) return;
    if (offset > size_ || size > size_ - offset)
      throw Error{ErrorCode::truncated, "the object ends inside the range that is wanted"}.with_path(path_).with_range(offset, offset + size);
    try {
      store_->get_range(name_, etag_, offset, pieces);
    } catch (Error& error) {
      throw error.with_range(offset, offset + size);
    }
  }

 private:
  S3StorePtr store_;
  std::string path_;
  S3Name name_;
  std::string etag_;
  std::uint64_t size_ = 0;
};

/// An object that says "<holder> <beat>", and is put anew at every beat while its holder lives, each time on condition that nobody else has since.
template <class = Deferred>
class ObjectLease final : public Lease {
 public:
  /// Nothing if another holder has it.
  static std::unique_ptr<Lease> acquire(S3StorePtr store, S3Name name) {
    std::uint64_t number = 0;
    if (::getentropy(&number, sizeof number) != 0) throw Error{ErrorCode::io, "the system gives no random number for a lease"}.with_errno(errno);
    std::string const holder = hex16(number), first = holder + " 0\n";
    for (int round = 0; round < 8; ++round) {
      auto etag = store->put(name, as_byte_span(first), {{"if-none-match", "*"}}, true);
      if (!etag) {
        auto const other = store->get(name, true);
        if (!other) continue;   // just released
        if (other->age < store->options().lease_life) return nullptr;
        etag = store->put(name, as_byte_span(first), {{"if-match", other->etag}}, true);
        if (!etag) return nullptr;   // it lives, or somebody else was first
      }
      auto lease = std::make_unique<ObjectLease>(store, name, holder, *etag);
      store->require_conditions(name, as_byte_span(holder + " -\n"));
      return lease;
    }
    return nullptr;
  }

  ObjectLease(S3StorePtr store, S3Name name, std::string holder, std::string etag) try
      : store_{std::move(store)}, name_{std::move(name)}, holder_{std::move(holder)}, etag_{std::move(etag)}, thread_{[this] { beat(); }} {
  } catch (std::system_error const& error) {
    throw Error{ErrorCode::io, "cannot start the thread that keeps the lease alive"}.with_errno(error.code().value());
  }
  ~ObjectLease() override {
    // A child made by fork has no thread, and holds nothing.
    if (::getpid() != owner_) {
      static_cast<void>(new Thread{std::move(thread_)});
      return;
    }
    {
      std::lock_guard const lock{mutex_};
      stop_ = true;
    }
    stopped_.notify_one();
    thread_.join();
    try {
      if (auto const now = store_->get(name_, true); now && now->bytes.starts_with(holder_)) store_->remove(name_);
    } catch (...) {
      // It is free when it has shown no sign of life for long enough.
    }
  }

 private:
  void beat() {
    std::unique_lock lock{mutex_};
    for (std::uint64_t n = 1; !stopped_.wait_for(lock, store_->options().lease_life / 6, [this] { return stop_; }); ++n) {
      lock.unlock();
      bool lost = false;
      try {
        std::string const text = holder_ + ' ' + std::to_string(n) + '\n';
        auto const etag = store_->put(name_, as_byte_span(text), {{"if-match", etag_}}, true);
        if (etag) etag_ = *etag;
        else lost = true;
      } catch (...) {
        // The next one may be heard.
      }
      lock.lock();
      if (lost) return;
    }
  }

  S3StorePtr store_;
  S3Name name_;
  std::string holder_, etag_;
  pid_t owner_ = ::getpid();
  Mutex mutex_;
  Condition stopped_;
  bool stop_ = false;
  Thread thread_;   // last: it uses the others
};

}  // namespace detail

/// Models Medium: a bucket of an object store. A handle: copies share connections. Thread-safe. See S3Options for where credentials, region and endpoint
/// come from; buckets must be there.
///
/// Memory    beside the budget of a save: a part (part_bytes) for each file that threads are in the middle of
/// Throws    Error(invalid_argument) on construction, without credentials; Error(io) with the store's code in words, after the attempts of S3Options
/// Example   dcp::ObjectStore store;
///           dcp::save<dcp::BasicSafeTensors<dcp::ObjectStore>>(world, {store, "bucket/run/step-100"}, state);
class ObjectStore {
 public:
  static constexpr bool renames_directories = false;
  static constexpr bool shared_by_ranks = true;
  using Options = S3Options;

  template <class D = Deferred>
  explicit ObjectStore(Options options = {}) : store_{std::make_shared<detail::S3Store<D>>(std::move(options))} {}

  template <class D = Deferred>
  std::unique_ptr<WritableFile> open_write(std::string const& path) { return std::make_unique<detail::ObjectWritableFile<D>>(store_, path); }
  template <class D = Deferred>
  std::unique_ptr<ReadableFile> open_read(std::string const& path) { return std::make_unique<detail::ObjectReadableFile<D>>(store_, path); }

  template <class = Deferred>
  bool put_file(std::string const& path, ConstByteSpan bytes, Expected expected) {
    auto const name = detail::S3Name::of(path);
    switch (expected.what) {
      case Expected::What::anything: return store_->put(name, bytes).has_value();
      case Expected::What::nothing: return store_->put(name, bytes, {{"if-none-match", "*"}}).has_value();
      case Expected::What::bytes: break;
    }
    auto const there = store_->get(name);
    return there && std::ranges::equal(as_byte_span(there->bytes), expected.bytes) && store_->put(name, bytes, {{"if-match", there->etag}}).has_value();
  }
  template <class = Deferred>
  void remove_file(std::string const& path) { store_->remove(detail::S3Name::of(path)); }

  template <class = Deferred>
  EntryKind kind(std::string const& path) {
    auto const name = detail::S3Name::of(path);
    if (name.bucket.empty()) return EntryKind::directory;
    if (!name.key.empty() && store_->head(name)) return EntryKind::file;
    bool below = name.key.empty();
    store_->list(name.bucket, name.prefix(), false, [&](std::string const&, std::optional<std::uint64_t>) { below = true; }, 1);
    return below ? EntryKind::directory : EntryKind::missing;
  }
  template <class = Deferred>
  std::vector<DirectoryEntry> list(std::string const& directory) {
    auto const name = detail::S3Name::of(directory);
    std::string const prefix = name.prefix();
    std::vector<DirectoryEntry> entries;
    store_->list(name.bucket, prefix, true, [&](std::string const& key, std::optional<std::uint64_t> size) {
      if (key.size() <= prefix.size() || !key.starts_with(prefix)) return;   // an object that stands for the directory itself
      if (size) entries.push_back({key.substr(prefix.size()), EntryKind::file, *size});
      else entries.push_back({key.substr(prefix.size(), key.size() - prefix.size() - 1), EntryKind::directory, 0});
    });
    std::sort(entries.begin(), entries.end(), [](DirectoryEntry const& a, DirectoryEntry const& b) { return a.name < b.name; });
    return entries;
  }
  template <class = Deferred>
  bool create_directory(std::string const& path) { return kind(path) != EntryKind::directory; }
  void create_directories(std::string const&) {}
  void sync_directory(std::string const&) {}
  template <class = Deferred>
  void remove_tree(std::string const& path) {
    auto const name = detail::S3Name::of(path);
    if (name.key.empty()) throw detail::memory_failure(EBUSY, path);   // a bucket is nobody's to empty
    std::vector<std::string> keys{name.key};
    store_->list(name.bucket, name.prefix(), false, [&](std::string const& key, std::optional<std::uint64_t>) { keys.push_back(key); });
    for (auto const& key : keys) store_->remove({name.bucket, key});
    store_->abort_uploads(name.bucket, name.prefix());
  }

  template <class D = Deferred>
  std::unique_ptr<Lease> acquire_lease(std::string const& path) { return detail::ObjectLease<D>::acquire(store_, detail::S3Name::of(path)); }
  template <class = Deferred>
  std::chrono::milliseconds lease_life() const { return store_->options().lease_life; }

  template <class = Deferred>
  std::string resolve_place(std::string const& path) {
    std::string const place = Memory{}.resolve_place(path);
    if (detail::S3Name::of(place).key.empty()) throw Error{ErrorCode::invalid_argument, "the place of a checkpoint in an object store is a bucket and a name in it: \"bucket/name\""}.with_path(path);
    return place;
  }
  template <class = Deferred>
  std::uint64_t block_bytes(std::string const&) { return 4096; }   // of a file with one writer it does not matter

 private:
  detail::S3StorePtr store_;
};

static_assert(Medium<ObjectStore>);

}  // namespace dcp
