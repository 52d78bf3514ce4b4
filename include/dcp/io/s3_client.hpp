// SPDX-License-Identifier: Apache-2.0
#pragma once
// Requests to an object store, as many at once as its budget allows, each tried again while there is hope. Needs libcurl; component dcp::s3.
//
// Tried again: what got no whole answer (refused and reset connections, timeouts, bodies that end early), and what the store says of itself (408, 429, 500, 502,
// 503, 504). The pauses between are random from nothing up to a bound that doubles ("full jitter": ranks that were refused together do not
// come back together), and no shorter than the store asks for. A request whose answer was lost may have been done: all requests here are
// such that doing them twice is doing them once, or their caller looks what is there.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/io/s3_sign.hpp>

#include <curl/curl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

enum class S3Addressing : std::uint8_t {
  automatic,      // virtual_host at AWS, path elsewhere and for buckets with a '.', whose hosts AWS's certificate does not cover
  path,           // https://host/bucket/key
  virtual_host,   // https://bucket.host/key
};

/// What is empty or zero here is taken from the environment, as AWS's own tools do: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or
/// AWS_DEFAULT_REGION. Credentials come from nowhere else: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN.
struct S3Options {
  std::string endpoint = {};                               // "https://host[:port]"
  std::string region = {};                                 // "us-east-1" if nobody says
  S3Addressing addressing = S3Addressing::automatic;
  int connections = 16;                                    // at once, of this handle and its copies
  int attempts = 10;                                       // of a request; with the pauses below at most 46 s of them
  std::chrono::milliseconds first_pause{100}, longest_pause{20'000};   // bounds of the random pauses between them
  std::chrono::milliseconds stall{30'000};                 // without a byte, before an attempt is given up
  std::uint64_t part_bytes = 16 << 20;                     // of uploads in parts, from 5 MiB on; a file has at most 10,000
  bool checksums = true;                                   // CRC-64/NVME of whole objects, for the store to check. Off for stores that refuse the headers
  std::chrono::milliseconds lease_life{30'000};            // a lease that shows no sign of life for so long, by the store's clock, is nobody's
};

struct S3Response {
  long status = 0;
  std::map<std::string, std::string> headers;   // names in lower case
  std::string body;                             // but for what a sink took

  template <class = Deferred>
  std::string header(std::string const& name) const {
    auto const at = headers.find(name);
    return at == headers.end() ? "" : at->second;
  }
};

template <class = Deferred>
class S3Client {
 public:
  explicit S3Client(S3Options options) : options_{std::move(options)} {
    auto const environment = [](std::initializer_list<char const*> names) -> std::string {
      for (auto const* name : names)
        if (char const* const value = std::getenv(name); value != nullptr && *value != '\0') return value;
      return {};
    };
    if (options_.region.empty()) options_.region = environment({"AWS_REGION", "AWS_DEFAULT_REGION"});
    if (options_.region.empty()) options_.region = "us-east-1";
    if (options_.endpoint.empty()) options_.endpoint = environment({"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"});
    bool const aws = options_.endpoint.empty();
    if (aws) options_.endpoint = "https://s3." + options_.region + ".amazonaws.com";
    virtual_host_ = options_.addressing == S3Addressing::virtual_host || (aws && options_.addressing == S3Addressing::automatic);
    credentials_ = {environment({"AWS_ACCESS_KEY_ID"}), environment({"AWS_SECRET_ACCESS_KEY"}), environment({"AWS_SESSION_TOKEN"})};
    auto const wrong = [](std::string const& what) { throw Error{ErrorCode::invalid_argument, what}; };
    if (credentials_.access_key.empty() || credentials_.secret_key.empty()) wrong("an object store needs credentials in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    while (options_.endpoint.ends_with('/')) options_.endpoint.pop_back();
    auto const scheme = options_.endpoint.find("://");
    secure_ = options_.endpoint.starts_with("https://");
    if (!secure_ && !options_.endpoint.starts_with("http://")) wrong("the endpoint of an object store begins with https:// or http://");
    authority_ = options_.endpoint.substr(scheme + 3);
    if (authority_.empty() || authority_.find_first_of("/?#@") != std::string::npos) wrong("the endpoint of an object store is a host and perhaps a port, without a path and without a user");
    // A usual port is not in the "Host" that is sent, so it must not be in the one that is signed.
    if (std::string const usual = secure_ ? ":443" : ":80"; authority_.ends_with(usual)) authority_.resize(authority_.size() - usual.size());
    if (options_.part_bytes < least_part_bytes || options_.part_bytes > most_part_bytes) wrong("parts of " + std::to_string(options_.part_bytes) + " bytes; stores take 5 MiB to 5 GiB");
    if (options_.connections < 1 || options_.attempts < 1) wrong("an object store needs at least one connection and one attempt");
    static bool const ready = ::curl_global_init(CURL_GLOBAL_DEFAULT) == CURLE_OK;
    if (!ready) throw Error{ErrorCode::io, "libcurl cannot be started"};
  }
  S3Client(S3Client const&) = delete;
  S3Client& operator=(S3Client const&) = delete;
  ~S3Client() {
    for (auto* const handle : idle_) ::curl_easy_cleanup(handle);
  }

  S3Options const& options() const { return options_; }

  struct Call {
    std::string method, bucket, key = {};
    S3Request::Fields query = {}, headers = {};
    ConstByteSpan body = {};
    std::vector<ByteSpan> sink = {};      // takes the body of a 206, which must fill it
    bool urgent = false;                  // does not wait for a connection to be free
    bool conflicts = false;               // 409 says that another was just writing: tried again
  };

  /// The store's answer, of any status that is not worth another attempt. Throws Error(io) if there is none in all attempts.
  S3Response perform(Call const& call) {
    std::chrono::milliseconds bound = options_.first_pause;
    for (int attempt = 1;; ++attempt) {
      Outcome outcome = once(call);
      bool const again = outcome.failure.empty() ? is_transient(outcome.response.status) || (call.conflicts && outcome.response.status == 409) : outcome.hopeful;
      if (outcome.failure.empty() && !again) return std::move(outcome.response);
      if (!again || attempt == options_.attempts) throw failure_of(call, outcome, attempt);
      auto pause = random_below(bound);
      bound = std::min(2 * bound, options_.longest_pause);
      pause = std::max(pause, std::min(retry_after(outcome.response), options_.longest_pause));
      detail::this_thread::sleep_for(pause);
    }
  }
  /// The same, but for a status that is not one of `fine`: an Error in words.
  S3Response expect(Call const& call, std::initializer_list<long> fine) {
    S3Response response = perform(call);
    if (std::find(fine.begin(), fine.end(), response.status) == fine.end()) throw refusal(call, response);
    return response;
  }

  /// What a refusal means. Of what the store says only its code is passed on: the rest may repeat what was signed.
  Error refusal(Call const& call, S3Response const& response) const {
    std::string const path = path_of(call), code = code_of(response);
    std::string const said = " (" + std::to_string(response.status) + (code.empty() ? "" : " " + code) + ")";
    auto const error = [&](int number, std::string const& what) {
      Error result{ErrorCode::io, what + said};
      result.with_path(path).with_errno(number);
      return result;
    };
    if (code == "NoSuchBucket") return error(ENOENT, "the object store has no bucket " + call.bucket).with_hint("buckets are not created here; the endpoint is " + options_.endpoint);
    if (response.status == 404) {
      Error missing{ErrorCode::missing_file, "there is no such object"};
      return missing.with_path(path).with_errno(ENOENT);
    }
    if (code == "RequestTimeTooSkewed") {
      auto const theirs = ::curl_getdate(response.header("date").c_str(), nullptr);
      auto const skew = theirs < 0 ? std::string{} : "; its clock is " + std::to_string(theirs - std::time(nullptr)) + " s ahead";
      return error(EACCES, "the object store refuses requests, because the clock of this machine is wrong" + skew);
    }
    if (code == "InvalidAccessKeyId") return error(EACCES, "the object store does not know the access key of AWS_ACCESS_KEY_ID");
    if (code == "SignatureDoesNotMatch") return error(EACCES, "the object store does not accept the signature").with_hint("AWS_SECRET_ACCESS_KEY belongs to another access key, or the region is not " + options_.region);
    if (code == "ExpiredToken" || code == "InvalidToken") return error(EACCES, "the object store does not accept AWS_SESSION_TOKEN any more");
    if (response.status == 401 || response.status == 403) return error(EACCES, "the object store denies access");
    if (response.status >= 300 && response.status < 400) return error(EREMOTE, "the bucket is elsewhere").with_hint("the region in use is " + options_.region + " (AWS_REGION), the endpoint " + options_.endpoint);
    if (response.status == 412) return error(ESTALE, "the object was changed meanwhile");
    if (response.status == 501) return error(EOPNOTSUPP, "the object store cannot do that");
    return error(EIO, "the object store refuses a " + call.method);
  }

  static constexpr std::uint64_t least_part_bytes = 5 << 20, most_part_bytes = std::uint64_t{5} << 30;
  static constexpr std::uint64_t most_parts = 10'000;

 private:
  struct Outcome {
    S3Response response;
    std::string failure;        // of the connection, in words; empty if there was an answer
    int system_error = 0;
    bool hopeful = false;
  };
  // What libcurl's callbacks fill.
  struct Exchange {
    CURL* handle = nullptr;
    S3Response* response = nullptr;
    std::vector<ByteSpan> const* sink = nullptr;
    std::size_t piece = 0, at = 0;      // of the sink: where the next byte goes
    std::size_t taken = 0;
    bool overflow = false;
  };

  static bool is_transient(long status) { return status == 408 || status == 429 || status == 500 || status == 502 || status == 503 || status == 504; }
  static std::string path_of(Call const& call) { return '/' + call.bucket + (call.key.empty() ? "" : '/' + call.key); }
  static std::string code_of(S3Response const& response) {
    std::string code = s3_text(response.body, "Code");
    bool const plain = code.size() <= 64 && std::all_of(code.begin(), code.end(), [](char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); });
    return plain ? code : "";
  }
  static std::chrono::milliseconds retry_after(S3Response const& response) {
    std::string const text = response.header("retry-after");
    long long const seconds = std::strtoll(text.c_str(), nullptr, 10);   // a date, which stores do not send, is 0
    return std::chrono::seconds{std::clamp<long long>(seconds, 0, 3600)};
  }
  static std::chrono::milliseconds random_below(std::chrono::milliseconds bound) {
    std::uint64_t number = 0;
    if (::getentropy(&number, sizeof number) != 0) number = 0;
    return std::chrono::milliseconds{static_cast<std::int64_t>(number % static_cast<std::uint64_t>(bound.count() + 1))};
  }
  Error failure_of(Call const& call, Outcome const& outcome, int attempts) const {
    std::string const tries = attempts > 1 ? " in " + std::to_string(attempts) + " attempts" : "";
    if (outcome.failure.empty()) {
      auto const code = code_of(outcome.response);
      Error error{ErrorCode::io, "the object store did not do it" + tries + ": " + std::to_string(outcome.response.status) + (code.empty() ? "" : " " + code)};
      return error.with_path(path_of(call)).with_errno(outcome.response.status == 503 || outcome.response.status == 429 ? EBUSY : EIO);
    }
    Error error{ErrorCode::io, "no answer from the object store" + tries + ": " + outcome.failure};
    return error.with_path(path_of(call)).with_errno(outcome.system_error).with_hint("the endpoint is " + options_.endpoint);
  }

  Outcome once(Call const& call) {
    Seat const seat{*this, call.urgent};
    CURL* const handle = seat.handle;
    S3Request request{call.method, authority_, path_of(call), call.query, call.headers};
    if (virtual_host_ && (options_.addressing == S3Addressing::virtual_host || call.bucket.find('.') == std::string::npos)) request.host = call.bucket + '.' + authority_, request.path = '/' + call.key;
    // Over a connection that nobody can change, the checksum in the signed headers is enough.
    s3_sign(request, secure_ ? "UNSIGNED-PAYLOAD" : hex_text(sha256(call.body)), credentials_, options_.region, std::time(nullptr));

    std::string url = (secure_ ? "https://" : "http://") + request.host + detail::s3_encoded(request.path, "/");
    if (std::string const query = s3_query(request.query); !query.empty()) url += '?' + query;
    std::unique_ptr<curl_slist, void (*)(curl_slist*)> headers{nullptr, ::curl_slist_free_all};
    auto const header = [&](std::string const& line) {
      auto* const longer = ::curl_slist_append(headers.get(), line.c_str());
      if (longer == nullptr) throw Error{ErrorCode::budget, "memory allocation failed"};
      static_cast<void>(headers.release());
      headers.reset(longer);
    };
    for (auto const& [name, value] : request.headers) header(name + ": " + value);
    for (auto const* const unwanted : {"expect:", "content-type:", "accept:"}) header(unwanted);

    Outcome outcome;
    Exchange exchange{handle, &outcome.response, &call.sink};
    ::curl_easy_reset(handle);
    auto const set = [&](CURLoption option, auto value) {
      if (::curl_easy_setopt(handle, option, value) != CURLE_OK) throw Error{ErrorCode::io, "libcurl refuses an option of a request"};
    };
    set(CURLOPT_URL, url.c_str());
    set(CURLOPT_HTTPHEADER, headers.get());
    set(CURLOPT_NOSIGNAL, 1L);
    set(CURLOPT_PATH_AS_IS, 1L);
    set(CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    set(CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(std::min(options_.stall, std::chrono::milliseconds{10'000}).count()));
    set(CURLOPT_LOW_SPEED_LIMIT, 1L);
    set(CURLOPT_LOW_SPEED_TIME, static_cast<long>(std::max<std::int64_t>(1, std::chrono::duration_cast<std::chrono::seconds>(options_.stall).count())));
    set(CURLOPT_HEADERFUNCTION, &take_header);
    set(CURLOPT_HEADERDATA, &exchange);
    set(CURLOPT_WRITEFUNCTION, &take_body);
    set(CURLOPT_WRITEDATA, &exchange);
    if (call.method == "HEAD") {
      set(CURLOPT_NOBODY, 1L);
    } else if (call.method != "GET") {
      if (call.method != "DELETE") {
        set(CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(call.body.size()));
        set(CURLOPT_POSTFIELDS, call.body.empty() ? "" : reinterpret_cast<char const*>(call.body.data()));
      }
      set(CURLOPT_CUSTOMREQUEST, call.method.c_str());
    }
    CURLcode const code = ::curl_easy_perform(handle);
    if (code == CURLE_OK) {
      ::curl_easy_getinfo(handle, CURLINFO_RESPONSE_CODE, &outcome.response.status);
      std::size_t wanted = 0;
      for (ByteSpan const piece : call.sink) wanted += piece.size();
      if (outcome.response.status == 206 && exchange.taken != wanted) outcome.failure = "fewer bytes than were asked for", outcome.system_error = EIO, outcome.hopeful = true;
      return outcome;
    }
    outcome.failure = exchange.overflow ? "more bytes than were asked for" : ::curl_easy_strerror(code);
    long number = 0;
    ::curl_easy_getinfo(handle, CURLINFO_OS_ERRNO, &number);
    outcome.system_error = code == CURLE_OPERATION_TIMEDOUT ? ETIMEDOUT : number != 0 ? static_cast<int>(number) : EIO;
    for (auto const hopeful : {CURLE_COULDNT_RESOLVE_HOST, CURLE_COULDNT_CONNECT, CURLE_OPERATION_TIMEDOUT, CURLE_SEND_ERROR, CURLE_RECV_ERROR, CURLE_GOT_NOTHING, CURLE_PARTIAL_FILE, CURLE_SSL_CONNECT_ERROR, CURLE_WEIRD_SERVER_REPLY, CURLE_WRITE_ERROR})
      outcome.hopeful = outcome.hopeful || code == hopeful;
    return outcome;
  }

  static std::size_t take_header(char* text, std::size_t size, std::size_t count, void* to) noexcept {
    try {
      auto& exchange = *static_cast<Exchange*>(to);
      std::string_view line{text, size * count};
      if (line.starts_with("HTTP/")) {
        exchange.response->headers.clear();   // of an answer before the answer ("100 Continue")
        exchange.response->body.clear();
      } else if (auto const colon = line.find(':'); colon != std::string_view::npos) {
        std::string name{line.substr(0, colon)};
        for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
        auto value = line.substr(colon + 1);
        while (!value.empty() && (value.front() == ' ' || value.front() == '\t')) value.remove_prefix(1);
        while (!value.empty() && (value.back() == '\r' || value.back() == '\n' || value.back() == ' ')) value.remove_suffix(1);
        exchange.response->headers[std::move(name)] = std::string{value};
      }
      return size * count;
    } catch (...) {
      return 0;
    }
  }
  static std::size_t take_body(char* text, std::size_t size, std::size_t count, void* to) noexcept {
    constexpr std::size_t most_body_bytes = 1 << 30;   // of what has no sink: lists, and small objects
    try {
      auto& exchange = *static_cast<Exchange*>(to);
      std::size_t left = size * count;
      long status = 0;
      ::curl_easy_getinfo(exchange.handle, CURLINFO_RESPONSE_CODE, &status);
      if (status != 206 || exchange.sink->empty()) {
        if (exchange.response->body.size() + left > most_body_bytes) return exchange.overflow = true, std::size_t{0};
        exchange.response->body.append(text, left);
        return left;
      }
      while (left > 0) {
        while (exchange.piece < exchange.sink->size() && exchange.at == (*exchange.sink)[exchange.piece].size()) ++exchange.piece, exchange.at = 0;
        if (exchange.piece == exchange.sink->size()) return exchange.overflow = true, std::size_t{0};
        ByteSpan const piece = (*exchange.sink)[exchange.piece];
        std::size_t const taken = std::min(left, piece.size() - exchange.at);
        std::copy_n(reinterpret_cast<std::byte const*>(text), taken, piece.begin() + static_cast<std::ptrdiff_t>(exchange.at));
        exchange.at += taken, exchange.taken += taken, text += taken, left -= taken;
      }
      return size * count;
    } catch (...) {
      return 0;
    }
  }

  // A connection, and the right to use one.
  struct Seat {
    S3Client& client;
    bool urgent;
    CURL* handle = nullptr;
    Seat(S3Client& of, bool at_once) : client{of}, urgent{at_once} {
      std::unique_lock lock{client.mutex_};
      if (!urgent) client.free_.wait(lock, [&] { return client.busy_ < client.options_.connections; }), ++client.busy_;
      if (!client.idle_.empty()) handle = client.idle_.back(), client.idle_.pop_back();
      lock.unlock();
      if (handle == nullptr) handle = ::curl_easy_init();
      if (handle != nullptr) return;
      leave();
      throw Error{ErrorCode::budget, "libcurl gives no handle"};
    }
    Seat(Seat const&) = delete;
    ~Seat() { leave(); }
    void leave() {
      {
        std::lock_guard const lock{client.mutex_};
        if (handle != nullptr) client.idle_.push_back(handle);   // with its connection
        if (!urgent) --client.busy_;
      }
      client.free_.notify_one();
    }
  };

  S3Options options_;
  S3Credentials credentials_;
  std::string authority_;
  bool secure_ = true, virtual_host_ = false;
  detail::Mutex mutex_;
  detail::Condition free_;
  std::vector<CURL*> idle_;
  int busy_ = 0;
};

}  // namespace dcp
