// SPDX-License-Identifier: Apache-2.0
// Pickles that are damaged, hostile, or lie about sizes: each is refused with its code, and none costs more memory than its bytes.
#include <dcp/formats/pickle.hpp>

#include "golden.hpp"
#include "support/allocations.hpp"
#include "support/generate.hpp"
#include "support/pickle_text.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::pickle;
using golden::outcome;
using test::lit;
using test::pickle_outcome;
using test::times;
using test::u32;
using test::u64;
using test::word;

namespace {

struct Row {
  std::string bytes, code;
};

/// Each row has its outcome, and what parsing allocates is bounded by its bytes: the nodes that are made in advance, and a few constants.
void check(std::vector<Row> const& rows, ParseOptions const& options = {}) {
  for (auto const& row : rows) {
    CAPTURE(row.bytes.substr(0, 100));
    test::AllocationPeak peak;
    CHECK(pickle_outcome(row.bytes, options) == row.code);
    if (test::counts_allocations) CHECK(peak.bytes() <= 200 * row.bytes.size() + 16384);
  }
}

std::string const os_system = "cos\nsystem\n", size = "ctorch\nSize\n", id_command = "X" + u32(2) + "id";

}  // namespace

TEST_CASE("Tree::parse: whoever is not allowed is refused by name, wherever and however it is called") {
  std::string const stack_os = word("os") + word("system") + "\x93";
  check({{os_system + ".", "unsupported"},
         {os_system + id_command + "\x85R.", "unsupported"},
         {"(" + os_system + id_command + "tR.", "unsupported"},
         {lit("\x80\x02") + os_system + id_command + "\x85R.", "unsupported"},
         {stack_os + id_command + "\x85R.", "unsupported"},
         {lit("\x80\x04\x95") + u64(stack_os.size() + 1) + stack_os + ".", "unsupported"},
         {os_system + id_command + "\x85\x81.", "unsupported"},
         {os_system + id_command + "\x85}\x92.", "unsupported"},
         {os_system + "0N.", "unsupported"},                 // though it is thrown away
         {"N(" + os_system + "1.", "unsupported"},
         {os_system + lit("q\0") + "0h" + lit("\0") + id_command + "\x85R.", "unsupported"},
         {"cposix\nsystem\n.", "unsupported"},
         {"cnt\nsystem\n.", "unsupported"},
         {"cbuiltins\neval\nX" + u32(3) + "1+1\x85R.", "unsupported"},
         {"c__builtin__\neval\n.", "unsupported"},
         {"cbuiltins\nexec\n.", "unsupported"},
         {"cbuiltins\ngetattr\n.", "unsupported"},
         {"cbuiltins\n__import__\n.", "unsupported"},
         {"csubprocess\nPopen\n.", "unsupported"},
         {"cpty\nspawn\n.", "unsupported"},
         {"crunpy\n_run_code\n.", "unsupported"},
         {"cpip\nmain\n.", "unsupported"},
         {"cpickle\nloads\n.", "unsupported"},
         {"ctorch.hub\nload\n.", "unsupported"},
         {"cTorch\nSize\n.", "unsupported"},
         {"ctorch \nSize\n.", "unsupported"},
         {"ctorch\r\nSize\r\n.", "unsupported"},
         {"c\nSize\n.", "unsupported"},
         {word("torch._C") + word("Size.__class__") + "\x93.", "unsupported"},
         {size + "(" + os_system + id_command + "\x85R\x85R.", "unsupported"},   // an argument of an allowed call
         {size + ")\x81}X" + u32(1) + "a" + os_system + id_command + "\x85Rsb.", "unsupported"},   // in a state
         {"}" + os_system + id_command + "\x85RNs.", "unsupported"},             // a key
         {os_system + "Q.", "unsupported"},
         {"(ios\nsystem\n.", "unsupported"},
         {"(X" + u32(2) + "idios\nsystem\n.", "unsupported"},
         {"(itorch\nSize\n.", "unsupported"},                // INST itself, not its global
         {"(" + size + "No.", "unsupported"},                // OBJ
         {"(" + os_system + id_command + "o.", "unsupported"},
         {lit("\x82\x01."), "unsupported"},
         {lit("\x83\x01\x00."), "unsupported"},
         {"\x84" + u32(1) + ".", "unsupported"},
         {"\x97.", "unsupported"},
         {"N\x98.", "unsupported"}});
  check({{os_system + id_command + "\x85R.", "ok"}, {"(ios\nsystem\n.", "unsupported"}, {"(" + os_system + "o.", "unsupported"}}, {.opaque = true});
}

TEST_CASE("Tree::parse: only globals are called, only with tuples, and only what a call gives has a state") {
  check({{"N)R.", "bad_schema"},
         {"K\x01)R.", "bad_schema"},
         {word("os.system") + ")R.", "bad_schema"},
         {size + ")R)R.", "bad_schema"},                     // what a call gives
         {size + ")\x81)\x81.", "bad_schema"},
         {"K\x01Q)R.", "bad_schema"},
         {"))\x81.", "bad_schema"},
         {size + "]R.", "bad_schema"},
         {size + "NR.", "bad_schema"},
         {size + "}\x81.", "bad_schema"},
         {size + "(NeR.", "bad_schema"},
         {size + ")N\x92.", "bad_schema"},
         {size + "N}\x92.", "bad_schema"},
         {size + "))\x92.", "bad_schema"},
         {"NNb.", "bad_schema"},
         {"]Nb.", "bad_schema"},
         {"}}b.", "bad_schema"},
         {size + "}b.", "bad_schema"},                       // the global itself
         {size + ")RNbNb.", "bad_schema"},                   // twice
         {size + ")\x81}b}b.", "bad_schema"},
         {"K\x01Q}b.", "bad_schema"},
         {"NN\x93.", "bad_schema"},
         {word("torch") + "N\x93.", "bad_schema"},
         {"N" + word("Size") + "\x93.", "bad_schema"},
         {"C\x05torch" + word("Size") + "\x93.", "bad_schema"},
         {"(" + word("torch") + word("Size") + "t\x93.", "bad_schema"},
         {"U\x01\xff" + word("Size") + "\x93.", "bad_schema"}});
}

TEST_CASE("Tree::parse: items go into lists, pairs into dicts, each into objects, and not both into one") {
  check({{"NNa.", "bad_schema"},
         {")Na.", "bad_schema"},
         {"}Na.", "bad_schema"},
         {"\x8fNa.", "bad_schema"},
         {word("a") + "Na.", "bad_schema"},
         {size + "Na.", "bad_schema"},
         {"N(Ne.", "bad_schema"},
         {"N(e.", "bad_schema"},
         {"}(NNe.", "bad_schema"},
         {")(NNe.", "bad_schema"},
         {"\x8f(Ne.", "bad_schema"},
         {"]NNs.", "bad_schema"},
         {"NNNs.", "bad_schema"},
         {"\x8fNNs.", "bad_schema"},
         {"](NNu.", "bad_schema"},
         {"N(NNu.", "bad_schema"},
         {"}(Nu.", "bad_schema"},
         {"}(NNNu.", "bad_schema"},
         {"(Nd.", "bad_schema"},
         {"](N\x90.", "bad_schema"},
         {"}(N\x90.", "bad_schema"},
         {size + ")R(N\x90.", "bad_schema"},
         {size + ")RNaNNs.", "bad_schema"},
         {size + ")RNNsNa.", "bad_schema"},
         {size + ")R(NNNu.", "bad_schema"},
         {size + ")RNaNa.", "ok"},
         {size + ")RNNsNNs.", "ok"}});
}

TEST_CASE("Tree::parse: nothing is taken from below a MARK, from an empty stack, or from an empty memo") {
  std::vector<Row> rows{{".", "bad_schema"}, {"NN.", "bad_schema"}, {"(.", "bad_schema"}, {"N(.", "bad_schema"}, {"(N.", "bad_schema"}, {"N(0N.", "bad_schema"}, {"N0.", "bad_schema"}, {lit("\x80\x02."), "bad_schema"}};
  for (std::string const takes_one : {"0", "2", "\x85", "Q", "\x94"}) rows.push_back({takes_one + ".", "bad_schema"});
  for (std::string const takes_two : {"\x86", "a", "R", "\x81", "b", "\x93"}) rows.push_back({takes_two + ".", "bad_schema"}), rows.push_back({"N" + takes_two + ".", "bad_schema"}), rows.push_back({"N(N" + takes_two + ".", "bad_schema"});
  for (std::string const takes_three : {"\x87", "s", "\x92"}) rows.push_back({"NN" + takes_three + ".", "bad_schema"}), rows.push_back({"}(NN" + takes_three + ".", "bad_schema"});
  for (std::string const takes_mark : {"1", "t", "l", "d", "e", "u", "\x90", "\x91"}) rows.push_back({"NN" + takes_mark + ".", "bad_schema"});
  for (std::string const fills : {"e", "u", "\x90"}) rows.push_back({"(" + fills + ".", "bad_schema"}), rows.push_back({"]((" + fills + ".", "bad_schema"});
  for (std::string const& recalls : {lit("h\0"), "j" + u32(0), std::string{"g0\n"}, "j" + u32(0xFFFFFFFF), std::string{"g18446744073709551615\n"}}) rows.push_back({recalls + ".", "bad_schema"}), rows.push_back({"Nq\x01" + recalls + ".", "bad_schema"});
  for (std::string const& memoizes : {lit("q\0"), "r" + u32(0), std::string{"p0\n"}}) rows.push_back({memoizes + ".", "bad_schema"}), rows.push_back({"N(" + memoizes + "t.", "bad_schema"});
  rows.push_back({"N(2t.", "bad_schema"});
  rows.push_back({"]N(a.", "bad_schema"});
  check(rows);
}

TEST_CASE("Tree::parse: sizes are not believed") {
  std::uint64_t const huge = std::uint64_t{1} << 63;
  check({{"", "truncated"}, {"N", "truncated"}, {"\x80", "truncated"}, {"K", "truncated"}, {lit("M\0"), "truncated"}, {"Jabc", "truncated"}, {"Gabcdefg", "truncated"}, {"q", "truncated"}, {"Nq", "truncated"}, {"Nrabc", "truncated"},
         {"\x8c", "truncated"}, {"\x8c\xff" "abc.", "truncated"}, {"X" + u32(0xFFFFFFFF) + "abc.", "truncated"}, {"Xabc", "truncated"}, {"\x8d" + u64(huge) + "abc.", "truncated"}, {"\x8d" + u64(~std::uint64_t{0}) + ".", "truncated"},
         {"C\x10.", "truncated"}, {"B" + u32(0xFFFFFFFF) + ".", "truncated"}, {"\x8e" + u64(huge) + ".", "truncated"}, {"\x8e" + u64(~std::uint64_t{0}) + ".", "truncated"}, {"\x96" + u64(huge) + ".", "truncated"}, {"\x96" + u64(huge - 1) + ".", "truncated"},
         {"U\x10.", "truncated"}, {"T" + u32(0x7FFFFFFF) + ".", "truncated"}, {"T" + u32(0x80000000) + ".", "bad_schema"}, {"T" + u32(0xFFFFFFFF) + ".", "bad_schema"},
         {"\x8a\xff.", "truncated"}, {"\x8b" + u32(0x7FFFFFFF) + ".", "truncated"}, {"\x8b" + u32(0x80000000) + ".", "bad_schema"}, {"\x8b" + u32(0xFFFFFFFF) + ".", "bad_schema"},
         {"\x95" + u64(huge) + "N.", "truncated"}, {"\x95" + u64(3) + "N.", "truncated"}, {"\x95" + u64(~std::uint64_t{0}) + "N.", "truncated"}, {"\x95" + u64(2).substr(1), "truncated"},
         {"ctorch", "truncated"}, {"ctorch\nSize", "truncated"}, {"I12", "truncated"}, {"L12L", "truncated"}, {"F1.5", "truncated"}, {"Vabc", "truncated"}, {"S'abc'", "truncated"}, {"Pabc", "truncated"}, {"g0", "truncated"}, {"Np0", "truncated"},
         {"Nr" + u32(0xFFFFFFFF) + ".", "ok"}, {"Np18446744073709551615\n.", "ok"}, {"Np18446744073709551616\n.", "bad_schema"}, {"(" + times(1000, "Nr" + u32(0xFFFFFFF0) + "r" + u32(0x7FFFFFFF)) + "t.", "ok"}});
}

TEST_CASE("Tree::parse: operands are spelt as Python spells them") {
  check({{"I\n.", "bad_schema"}, {"Ix\n.", "bad_schema"}, {"I-\n.", "bad_schema"}, {"I1 \n.", "bad_schema"}, {"I012\n.", "bad_schema"}, {"I0x10\n.", "bad_schema"}, {"I1.0\n.", "bad_schema"}, {"L\n.", "bad_schema"}, {"LL\n.", "bad_schema"}, {"L1LL\n.", "bad_schema"},
         {"I\xff\n.", "bad_schema"}, {"L" + std::string(4301, '9') + "L\n.", "limit"}, {"L" + std::string(4300, '9') + "L\n.", "ok"}, {"F\n.", "bad_schema"}, {"F1.5x\n.", "bad_schema"}, {"F 1\n.", "bad_schema"}, {"F1e999\n.", "bad_schema"},
         {"Np-1\n.", "bad_schema"}, {"Npx\n.", "bad_schema"}, {"Np\n.", "bad_schema"}, {"gx\n.", "bad_schema"}, {"g\xff\n.", "bad_schema"},
         {"V\\u12\n.", "bad_schema"}, {"V\\u12g4\n.", "bad_schema"}, {"V\\U0001f68\n.", "bad_schema"}, {"V\\ud800\n.", "bad_utf8"}, {"V\\ud83d\\ude80\n.", "bad_utf8"}, {"V\\U00110000\n.", "bad_utf8"}, {"V\\uffff\n.", "ok"},
         {"Sabc\n.", "bad_schema"}, {"S'abc\n.", "bad_schema"}, {"S'\n.", "bad_schema"}, {"S\n.", "bad_schema"}, {"S'a\"\n.", "bad_schema"}, {"S'\\x4'\n.", "bad_schema"}, {"S'\\x-1'\n.", "bad_schema"}, {"S'\\q'\n.", "bad_schema"}, {"S'\\'\n.", "bad_schema"},
         {"X" + u32(1) + "\xff.", "bad_utf8"}, {word("\xed\xa0\x80") + ".", "bad_utf8"}, {word("\xc0\xaf") + ".", "bad_utf8"}, {"\x8d" + u64(1) + "\x80.", "bad_utf8"}, {"ctorch\n\xff\n.", "bad_utf8"}, {"c\xff\nSize\n.", "bad_utf8"}, {"P\xff\n.", "bad_utf8"},
         {"\x80\x06N.", "bad_version"}, {"\x80\xffN.", "bad_version"}, {lit("\x80\x02N\x80\x07."), "bad_version"},
         {"N.N.", "trailing_data"}, {"N.\n", "trailing_data"}, {lit("N.\0"), "trailing_data"}});
}

TEST_CASE("Tree::parse: opcodes that pickles do not have are refused with their number") {
  std::string const known = "(.012FIJKLMNPQRSTUVXabcdegh]jlopqrstu)iGBC}";
  for (int code = 0; code < 256; ++code) {
    if (known.find(static_cast<char>(code)) != std::string::npos || (code >= 0x80 && code <= 0x98)) continue;
    CAPTURE(code);
    CHECK(pickle_outcome("N" + std::string(1, static_cast<char>(code)) + ".") == "unsupported");
  }
  try {
    Tree::parse(as_byte_span("N\xff."), [](auto, auto) { return true; });
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.message() == "the pickle uses the opcode 0xff, which is not known (byte 1 of 3)");
  }
  try {
    Tree::parse(as_byte_span("N(otorch\nSize\n."), [](auto, auto) { return true; }, {.first_byte = 1000});
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.message().find("uses OBJ") != std::string::npos);
    Error located = error;
    CHECK(std::string{located.with_path("f").what()}.find("bytes [1002, 1003)") != std::string::npos);
  }
}

TEST_CASE("Tree::parse: each limit is named by the error of what is beyond it") {
  auto const message = [](std::string const& bytes, ParseOptions const& options) -> std::string {
    try {
      Tree::parse(as_byte_span(bytes), [](auto, auto) { return true; }, options);
    } catch (Error const& error) {
      return error.code() == ErrorCode::limit ? error.message() : "another error";
    }
    return "ok";
  };
  auto const names = [&](std::string const& bytes, Limits const& limits, char const* name) { return message(bytes, {.limits = limits}).find(name) != std::string::npos; };
  CHECK(names("N" + std::string(10, '2') + ".", {.max_bytes = 11}, "max_bytes"));
  CHECK(message("N.", {.limits = {.max_bytes = 2}}) == "ok");
  CHECK(message("N.garbage", {.limits = {.max_bytes = 2}, .allow_trailing_bytes = true}) == "ok");
  CHECK(message("K\x01.garbage", {.limits = {.max_bytes = 2}, .allow_trailing_bytes = true}).find("max_bytes") != std::string::npos);
  CHECK(names("](" + times(10, "M\xff\xff") + "e.", {.max_nodes = 14}, "max_nodes"));
  CHECK(message("](" + times(10, "M\xff\xff") + "e.", {.limits = {.max_nodes = 15}}) == "ok");   // three constants and the empty tuple are in every tree
  CHECK(names(times(5, "(") + times(5, "t") + ".", {.max_depth = 4}, "max_depth"));
  CHECK(message(times(5, "(") + times(5, "t") + ".", {.limits = {.max_depth = 5}}) == "ok");
  CHECK(names("N\x94\x94\x94.", {.max_memo = 2}, "max_memo"));
  CHECK(names("Nr" + u32(1'000'000) + lit("q\0q\1") + ".", {.max_memo = 2}, "max_memo"));
  CHECK(message(lit("Nq\0q\0q\0q\0."), {.limits = {.max_memo = 1}}) == "ok");
  CHECK(pickle_outcome(times(1001, "(") + times(1001, "t") + ".") == "limit");
  CHECK(pickle_outcome(times(1'000'000, "(")) == "limit");
}

TEST_CASE("Tree::parse: a few bytes that stand for much, or for themselves, cost their bytes") {
  check({{"N" + times(1000, "2\x86") + ".", "ok"},                         // 2^1000 values
         {"](" + times(20, "]\x94(" + times(10, lit("h\0")) + "e") + "e.", "ok"},
         {"N" + times(10'000, "2\x85") + ".", "bad_schema"},
         {"N" + times(100'000, "\x85") + ".", "ok"},                       // a deep nest without MARKs
         {times(100'000, "]") + times(99'999, "a") + ".", "ok"},
         {"]2a.", "ok"},
         {"(" + std::string(100'000, '2'), "bad_schema"},
         {"(N" + std::string(100'000, '2') + "t.", "ok"},
         {times(50'000, "N(") + "t.", "limit"},
         {"(" + std::string(100'000, '}') + "l.", "ok"},
         {"]" + times(30'000, "Na]0") + ".", "ok"},
         {lit("]q\0]q\1") + "0" + times(30'000, lit("h\1Na0h\0Na0")) + ".", "ok"},   // batches of one
         {size + ")R" + times(30'000, "0" + size + ")R") + ".", "ok"},
         {times(30'000, lit("Nq\0") + "0") + "N.", "ok"},
         {times(10'000, "I9\n0") + "N.", "ok"}});
}

TEST_CASE("Tree::parse: random damage to real files does no harm") {
  std::uint64_t const first = test::first_seed();
  std::vector<std::string> files;
  for (auto const& path : golden::files_below(golden::root() / "pickle", ".pkl")) files.push_back(golden::text_of(path));
  REQUIRE(files.size() == 10);
  std::size_t accepted = 0;
  for (std::uint64_t seed = first; seed < first + 20'000; ++seed) {
    CAPTURE(seed);
    test::Random random{seed};
    std::string bytes = random.any_of(files);
    for (std::int64_t n = random.between(1, 3); n > 0; --n) bytes[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(bytes.size()) - 1))] = static_cast<char>(random.between(0, 255));
    try {
      auto const tree = Tree::parse(as_byte_span(bytes), [](auto, auto) { return true; });
      expanded_nodes(tree.root(), 100'000);
      CHECK_FALSE(test::pickle_text(tree.root()).empty());
      ++accepted;
    } catch (Error const&) {
    }
  }
  CHECK(accepted > 0);
}
