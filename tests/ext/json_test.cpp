// SPDX-License-Identifier: Apache-2.0
#include <dcp/ext/json.hpp>

// What a file sees that does not include nlohmann/json.hpp: the name of the type, and that it is a state's value.
#ifdef INCLUDE_NLOHMANN_JSON_HPP_
#error "dcp/ext/json.hpp includes nlohmann/json.hpp"
#endif
static_assert(dcp::detail::HasEntryOf<nlohmann::json> && !dcp::EntryOf<nlohmann::json>::is_view);

#include <nlohmann/json.hpp>

#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Storage = dcp::BasicSafeTensors<dcp::Memory>;

nlohmann::json every_kind() {
  return {{"null", nullptr}, {"yes", true}, {"text", "\xc3\xa9 \"\\\n\xf0\x9f\x9a\x80"}, {"least", INT64_MIN}, {"most", UINT64_MAX}, {"tenth", 0.1}, {"tiny", 5e-324}, {"minus zero", -0.0},
          {"list", {1, 2.5, {{"deep", nlohmann::json::array()}}}}, {"empty", nlohmann::json::object()}};
}

/// The code of the Error that saving `json` throws.
std::string save_fails_with(nlohmann::json json) {
  dcp::Memory store;
  std::string code = "saved";
  dcp::run_threads(1, [&](dcp::ThreadComm& world) {
    dcp::StateDict const state{{"the.document", json}};
    try {
      dcp::save<Storage>(world, {store, "refused"}, state);
    } catch (dcp::Error const& error) {
      if (error.message().find("the.document: ") != 0) throw;   // it says which
      code = to_string(error.code());
    }
  });
  return code;
}

}  // namespace

TEST_CASE("json: a document comes back equal, with the types of its numbers") {
  dcp::Memory store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    nlohmann::json config = every_kind();
    nlohmann::json large = std::vector<double>(10'000, 0.1);   // beyond what stands in the commit record
    nlohmann::ordered_json ordered{{"z", 1}, {"a", 2}};
    dcp::save<Storage>(world, {store, "json"}, {{"config", config}, {"large", large}, {"ordered", ordered}});
    nlohmann::json read_config, read_large{{"overwritten", 1}};
    nlohmann::ordered_json read_ordered;
    dcp::load<Storage>(world, {store, "json"}, {{"config", read_config}, {"large", read_large}, {"ordered", read_ordered}});
    if (read_config != every_kind() || read_config.dump() != every_kind().dump()) throw std::runtime_error{"another document: " + read_config.dump()};
    if (!read_config["most"].is_number_unsigned() || !read_config["tenth"].is_number_float() || !std::signbit(read_config["minus zero"].get<double>()))
      throw std::runtime_error{"another type of number"};
    if (read_large != large) throw std::runtime_error{"another large document"};
    if (read_ordered.dump() != R"({"z":1,"a":2})") throw std::runtime_error{"another order: " + read_ordered.dump()};
  });
}

TEST_CASE("json: every rank has its own document under per_rank") {
  dcp::Memory store;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    nlohmann::json mine{{"rank", world.rank()}, {"seen", std::vector<int>(static_cast<std::size_t>(world.rank()), 7)}};
    dcp::save<Storage>(world, {store, "per_rank"}, {{"loader", dcp::per_rank(mine)}});
    nlohmann::json read;
    dcp::load<Storage>(world, {store, "per_rank"}, {{"loader", dcp::per_rank(read)}});
    if (read != mine) throw std::runtime_error{"the document of another rank: " + read.dump()};
  });
}

TEST_CASE("json: what JSON cannot say is refused when saving, however deep it stands") {
  double const infinity = std::numeric_limits<double>::infinity();
  CHECK(save_fails_with(std::numeric_limits<double>::quiet_NaN()) == "invalid_argument");
  CHECK(save_fails_with({1, {{"a", {2.0, -infinity}}}}) == "invalid_argument");
  CHECK(save_fails_with({{"a", "\xff"}}) == "bad_utf8");
  CHECK(save_fails_with({{"a", 1e308}}) == "saved");
}

TEST_CASE("json: a document does not load into a text, nor a text into a document") {
  dcp::Memory store;
  dcp::run_threads(1, [&](dcp::ThreadComm& world) {
    nlohmann::json json{1, 2};
    std::string text = "[1,2]";
    dcp::save<Storage>(world, {store, "kinds"}, {{"json", json}, {"text", text}});
    auto const code_of = [&](dcp::StateDict const& state) -> std::string {
      try {
        dcp::load<Storage>(world, {store, "kinds"}, state);
      } catch (dcp::Error const& error) {
        return std::string{to_string(error.code())};
      }
      return "loaded";
    };
    if (auto const code = code_of({{"json", text}, {"text", text}}); code != "kind_mismatch") throw std::runtime_error{code};
    if (auto const code = code_of({{"json", json}, {"text", json}}); code != "kind_mismatch") throw std::runtime_error{code};
  });
}
