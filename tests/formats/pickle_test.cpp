// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/pickle.hpp>

#include "golden.hpp"
#include "support/generate.hpp"
#include "support/pickle_text.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::pickle;
using golden::outcome;
using test::lit;
using test::pickle_outcome;
using test::pickle_text;
using test::times;
using test::u32;
using test::u64;
using test::word;

namespace {

auto const everything = [](std::string_view, std::string_view) { return true; };

std::string text_of(Bytes const& bytes) { return std::string{as_text(bytes)}; }
std::string outcome_of(auto const& call) {
  return outcome([&] { call(); });
}

/// A random value, written with `writer`; the text that reading it must give.
std::string write_random(Writer& writer, test::Random& random, int depth) {
  static std::vector<std::string> const texts{"", "a", "weight", "\xc3\xa9\xf0\x9f\x9a\x80", std::string("\0\n'\\", 4), std::string(300, 'x')};
  auto const a_text = [&] { return random.one_in(3) ? "name " + std::to_string(random.between(0, 400)) : random.any_of(texts); };
  auto const bits = [&] { return static_cast<std::uint64_t>(random.between(INT64_MIN, INT64_MAX)); };
  std::string out;
  switch (random.between(0, depth > 0 ? 15 : 8)) {
    case 0: writer.none(); return "None";
    case 1: {
      bool const value = random.one_in(2);
      writer.boolean(value);
      return value ? "True" : "False";
    }
    case 2: {
      std::int64_t const value = static_cast<std::int64_t>(bits()) >> random.between(0, 63);
      writer.integer(value);
      return std::to_string(value);
    }
    case 3: {
      std::uint64_t const value = bits() >> random.between(1, 63);
      writer.natural(value);
      return std::to_string(value);
    }
    case 4: {
      double const value = std::bit_cast<double>(bits());
      double const finite = std::isfinite(value) ? value : std::numeric_limits<double>::infinity();
      writer.real(finite);
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.17g", finite);
      return std::string{"float "} + digits;
    }
    case 5: {
      std::string const value = a_text();
      writer.text(value);
      return '\'' + value + '\'';
    }
    case 6: {
      std::string const value = a_text();
      writer.repeated_text(value);
      return '\'' + value + '\'';
    }
    case 7: {
      std::string const name = "name" + std::to_string(random.between(0, 300));
      writer.global("torch", name);
      return "torch." + name;
    }
    case 8: {
      std::vector<std::int64_t> sizes(static_cast<std::size_t>(random.between(0, 5)));
      for (auto& size : sizes) size = random.between(-2, 70000), out += (out.empty() ? "" : ", ") + std::to_string(size);
      writer.size_tuple(sizes);
      return '(' + out + (sizes.size() == 1 ? ",)" : ")");
    }
    default: break;
  }
  std::int64_t const count = random.between(0, 4);
  auto const items = [&](std::int64_t n) {
    std::string list;
    for (std::int64_t i = 0; i < n; ++i) list += (i > 0 ? ", " : "") + write_random(writer, random, depth - 1);
    return list;
  };
  auto const pairs = [&] {
    std::string list;
    for (std::int64_t i = 0; i < count; ++i) {
      list += (i > 0 ? ", " : "") + write_random(writer, random, depth - 1) + ": ";
      list += write_random(writer, random, depth - 1);
    }
    return list;
  };
  switch (random.between(0, 5)) {
    case 0: writer.empty_list().mark(), out = '[' + items(count) + ']', writer.appends(); break;
    case 1: writer.empty_dict().mark(), out = '{' + pairs() + '}', writer.setitems(); break;
    case 2: writer.mark(), out = '(' + items(count) + (count == 1 ? ",)" : ")"), writer.tuple(); break;
    case 3: writer.empty_list(), out = '[' + items(1) + ']', writer.append(); break;
    case 4:
      writer.global("collections", "OrderedDict").empty_tuple().newobj();
      out = "new collections.OrderedDict() state " + items(1);
      writer.build();
      break;
    default: out = "persistent (" + items(2) + ")", writer.tuple2().persistent_id(); break;
  }
  return out;
}

}  // namespace

TEST_CASE("Tree::parse: each instruction makes the value that CPython gives it") {
  struct Row {
    std::string bytes, text;
  };
  for (auto const& row : std::vector<Row>{
           {"N.", "None"}, {lit("\x80\x00N."), "None"}, {lit("\x80\x05N."), "None"}, {"\x88.", "True"}, {"\x89.", "False"},
           {"I01\n.", "True"}, {"I00\n.", "False"}, {"I1\n.", "1"}, {"I0\n.", "0"}, {"I-12\n.", "-12"}, {"I9223372036854775807\n.", "9223372036854775807"}, {"I9223372036854775808\n.", "0x000000000000008000"},
           {"L-9223372036854775808L\n.", "-9223372036854775808"}, {"L-9223372036854775809L\n.", "0xffffffffffffff7fff"}, {"L0L\n.", "0"}, {"L12\n.", "12"}, {"L18446744073709551615L\n.", "0xffffffffffffffff00"},
           {"L340282366920938463463374607431768211456L\n.", "0x0000000000000000000000000000000001"}, {"L-340282366920938463463374607431768211456L\n.", "0x00000000000000000000000000000000ff"},
           {"K\xff.", "255"}, {lit("M\x00\x01."), "256"}, {"J" + u32(0xFFFFFFFE) + ".", "-2"}, {"J" + u32(0x7FFFFFFF) + ".", "2147483647"},
           {lit("\x8a\x00."), "0"}, {lit("\x8a\x01\xff."), "-1"}, {lit("\x8a\x02\xff\x00."), "255"}, {lit("\x8a\x05\x00\x00\x00\x80\x00."), "2147483648"}, {lit("\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80."), "-9223372036854775808"},
           {lit("\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x80\x00."), "0x000000000000008000"}, {lit("\x8a\x0a\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00."), "1"},
           {lit("\x8a\x0a\xfe\xff\xff\xff\xff\xff\xff\xff\xff\xff."), "-2"}, {"\x8b" + u32(2) + lit("\x01\x02."), "513"}, {"\x8b" + u32(0) + ".", "0"},
           {lit("G\x3f\xf8\x00\x00\x00\x00\x00\x00."), "float 1.5"}, {lit("G\x7f\xf0\x00\x00\x00\x00\x00\x00."), "float inf"}, {"F1.5\n.", "float 1.5"}, {"F-inf\n.", "float -inf"}, {"Fnan\n.", "float nan"}, {"F1e-07\n.", "float 9.9999999999999995e-08"},
           {word("") + ".", "''"}, {word("a\xc3\xa9") + ".", "'a\xc3\xa9'"}, {"X" + u32(3) + "abc.", "'abc'"}, {"\x8d" + u64(3) + "abc.", "'abc'"},
           {"Va\xe9\n.", "'a\xc3\xa9'"}, {"V\\u005c\\u000a\\U0001f680\n.", "'\\\n\xf0\x9f\x9a\x80'"}, {"Va\\b\\\n.", "'a\\b\\'"}, {"V\\\\u0041\n.", "'\\\\u0041'"}, {"V\\u20ac\n.", "'\xe2\x82\xac'"},
           {"S'abc'\n.", "'abc'"}, {"S\"a'\"\n.", "'a''"}, {"S'\\x41\\n\\\\\\''\n.", "'A\n\\''"}, {"S'\\xff'\n.", "b'ff'"}, {"S''\n.", "''"}, {"U\x03" "abc.", "'abc'"}, {"U\x02\xff\xfe.", "b'fffe'"}, {"T" + u32(3) + "abc.", "'abc'"},
           {"C\x02\xff\xfe.", "b'fffe'"}, {"B" + u32(1) + "a.", "b'61'"}, {"\x8e" + u64(1) + "a.", "b'61'"}, {"\x96" + u64(2) + "ab.", "b'6162'"},
           {").", "()"}, {"N\x85.", "(None,)"}, {"N\x88\x86.", "(None, True)"}, {"N\x88\x89\x87.", "(None, True, False)"}, {"(N\x88\x89Nt.", "(None, True, False, None)"}, {"(t.", "()"},
           {"].", "[]"}, {"]Na.", "[None]"}, {"](N\x88" "e.", "[None, True]"}, {"](e.", "[]"}, {"(N\x88l.", "[None, True]"}, {"](Ne(\x88" "e\x89" "a.", "[None, True, False]"},
           {"}.", "{}"}, {"}N\x88s.", "{None: True}"}, {"}(N\x88\x89Nu.", "{None: True, False: None}"}, {"(N\x88" "d.", "{None: True}"}, {"}(u.", "{}"},
           {"\x8f.", "{}"}, {"\x8f(N\x88\x90.", "{None, True}"}, {"(N\x88\x91.", "{None, True}"},
           {"ctorch\nfloat32\n.", "torch.float32"}, {word("torch") + word("a.b") + "\x93.", "torch.a.b"},
           {"ctorch\nSize\n(K\x01K\x02t\x85R.", "torch.Size((1, 2),)"}, {"ctorch\nSize\n)\x81.", "new torch.Size()"}, {"ctorch\nSize\n)}\x92.", "new torch.Size()**{}"},
           {"ctorch\nSize\n)\x81Nb.", "new torch.Size() state None"}, {"ctorch\nSize\n)\x81}N\x88sb.", "new torch.Size() state {None: True}"},
           {"ccollections\nOrderedDict\n)RN\x88s(\x89\x89u.", "collections.OrderedDict() {None: True, False: False}"}, {"ccollections\ndeque\n)RNa(\x88\x89" "e.", "collections.deque() [None, True, False]"},
           {"P0\n.", "persistent '0'"}, {"K\x07Q.", "persistent 7"},
           {"NN0.", "None"}, {"N(0.", "None"}, {"N(\x88\x89" "1.", "None"}, {"N2\x86.", "(None, None)"},
           {lit("]q\x00h\x00\x86."), "([], [])"}, {"]r" + u32(4'000'000'000) + "j" + u32(4'000'000'000) + "\x86.", "([], [])"}, {"]p99999999999\ng99999999999\n\x86.", "([], [])"}, {lit("]\x94h\x00\x86."), "([], [])"},
           {lit("]q\x05N\x94h\x01\x87."), "([], None, None)"}, {lit("]q\x00Nq\x00h\x00\x87."), "([], None, None)"},
           {"\x95" + u64(2) + "N.", "None"}, {"\x95" + u64(0) + "N.", "None"}}) {
    CAPTURE(row.bytes);
    CHECK(pickle_text(row.bytes) == row.text);
  }
}

TEST_CASE("Tree::parse: batches of a container are one after the other, however they are interleaved with those of others") {
  std::string bytes = "]q" + std::string(1, '\0') + "}q\x01\x86", list, dict;
  for (int i = 0; i < 40; ++i) {
    std::string const n = "K" + std::string(1, static_cast<char>(i));
    bytes += std::string("h\0", 2) + (i % 3 == 0 ? n + "a" : "(" + n + n + "e") + "0" + "h\x01" + n + "Ns0";
    list += (i > 0 ? ", " : "") + std::to_string(i) + (i % 3 == 0 ? "" : ", " + std::to_string(i));
    dict += (i > 0 ? ", " : "") + std::to_string(i) + ": None";
  }
  bytes += '.';
  CHECK(pickle_text(bytes) == "([" + list + "], {" + dict + "})");
  auto const tree = Tree::parse(as_byte_span(bytes), everything);
  Value const first = tree.root().item(0);
  CHECK(first.size() == 66);
  CHECK(tree.root().item(1).size() == 40);
  for (std::size_t i = 0, at = 0; at < 66; ++at) {
    CHECK(first.item(at).integer() == static_cast<std::int64_t>(i));
    if (i % 3 == 0 || (at > 0 && first.item(at - 1).integer() == static_cast<std::int64_t>(i))) ++i;
  }
  CHECK(outcome_of([&] { first.item(66); }) == "bad_schema");
}

TEST_CASE("Tree::parse: a memoized value is one value in all its places, a small integer wherever it stands") {
  std::string const bytes = lit("]q\x00h\x00]\x87.");
  auto const tree = Tree::parse(as_byte_span(bytes), everything);
  Value const root = tree.root();
  CHECK(root.item(0).id() == root.item(1).id());
  CHECK(root.item(0).id() != root.item(2).id());
  std::string const numbers = "K\x01K\xffK\x01\x87.";
  auto const small = Tree::parse(as_byte_span(numbers), everything);
  CHECK(small.root().item(0).id() == small.root().item(2).id());
  CHECK(small.root().item(0).id() != small.root().item(1).id());
  CHECK(pickle_text(small.root()) == "(1, 255, 1)");
}

TEST_CASE("Tree::parse asks once for each global, and says which are allowed") {
  std::string const bytes = "ctorch\nSize\ncos\nsystem\n" + word("builtins") + word("a.b") + "\x93\x87.";
  std::vector<std::string> asked;
  auto const listen = [&](std::string_view module, std::string_view name) {
    asked.push_back(std::string{module} + ' ' + std::string{name});
    return module == "torch";
  };
  CHECK(outcome_of([&] { Tree::parse(as_byte_span(bytes), listen); }) == "unsupported");
  CHECK(asked == std::vector<std::string>{"torch Size", "os system"});
  asked.clear();
  auto const tree = Tree::parse(as_byte_span(bytes), listen, {.opaque = true});
  CHECK(asked == std::vector<std::string>{"torch Size", "os system", "builtins a.b"});
  CHECK(pickle_text(tree.root()) == "(torch.Size, os.system?, builtins.a.b?)");
  CHECK_FALSE(tree.root().item(1).is_allowed());
  try {
    Tree::parse(as_byte_span(bytes), listen);
  } catch (Error const& error) {
    CHECK(error.message() == "the pickle refers to \"system\" of the module \"os\", which is not allowed (byte 12 of " + std::to_string(bytes.size()) + ")");
  }
}

TEST_CASE("Tree::parse: STOP ends a pickle, and what follows is an error or the caller's") {
  std::string const bytes = "N.K\x01.rest";
  CHECK(pickle_outcome(bytes) == "trailing_data");
  std::size_t consumed = 0;
  Tree const first = Tree::parse(as_byte_span(bytes), everything, {.allow_trailing_bytes = true}, &consumed);
  CHECK(first.root().is_none());
  CHECK(consumed == 2);
  Tree const second = Tree::parse(as_byte_span(bytes).subspan(2), everything, {.allow_trailing_bytes = true}, &consumed);
  CHECK(second.root().integer() == 1);
  CHECK(consumed == 3);
  Tree::parse(as_byte_span(bytes).first(2), everything, {}, &consumed);
  CHECK(consumed == 2);
}

TEST_CASE("Value: a question that the value has no answer to is an error, and says what the value is") {
  std::string const bytes = "(Nctorch\nSize\n)R](K\x01K\xff\x8a\x01\xff" "e}X\x01" + lit("\0\0\0") + "aK\x01sX\x01" + lit("\0\0\0") + "aK\x02s\x8a\x09" + times(8, "\xff") + lit("\0") + "t.";
  auto const tree = Tree::parse(as_byte_span(bytes), everything);
  Value const root = tree.root(), none = root.item(0), object = root.item(1), list = root.item(2), dict = root.item(3), large = root.item(4);
  CHECK(root.size() == 5);
  CHECK(dict.at("a").natural() == 2);   // the last one counts
  CHECK(dict.size() == 2);
  CHECK_FALSE(dict.find("b"));
  CHECK(large.natural() == UINT64_MAX);
  CHECK(object.is_call_of("torch", "Size"));
  CHECK_FALSE(object.is_call_of("torch", "size"));
  CHECK_FALSE(none.is_call_of("torch", "Size"));
  CHECK(object.size() == 0);
  object.for_each([](Value const&) { FAIL("an object without items"); });
  object.for_each_pair([](Value const&, Value const&) { FAIL("an object without items"); });
  CHECK_FALSE(object.state());
  CHECK_FALSE(object.find("a"));
  auto const wrong = [&](auto const& call) { CHECK(outcome_of(call) == "bad_schema"); };
  wrong([&] { none.boolean(); });
  wrong([&] { none.integer(); });
  wrong([&] { none.real(); });
  wrong([&] { none.text(); });
  wrong([&] { none.bytes(); });
  wrong([&] { none.size(); });
  wrong([&] { none.item(0); });
  wrong([&] { none.for_each([](Value const&) {}); });
  wrong([&] { list.for_each_pair([](Value const&, Value const&) {}); });
  wrong([&] { dict.for_each([](Value const&) {}); });
  wrong([&] { dict.item(0); });
  wrong([&] { dict.at("b"); });
  wrong([&] { list.find("a"); });
  wrong([&] { list.item(3); });
  wrong([&] { list.item(2).natural(); });
  wrong([&] { large.integer(); });
  wrong([&] { list.module(); });
  wrong([&] { list.is_allowed(); });
  wrong([&] { list.arguments(); });
  wrong([&] { none.state(); });
  wrong([&] { none.by_newobj(); });
  wrong([&] { object.persistent_id(); });
  try {
    list.text();
  } catch (Error const& error) {
    CHECK(error.message() == "a value of a pickle is a list, not a text");
  }
}

TEST_CASE("Tree::parse: checkpoints' metadata of every protocol that PyTorch has used are read") {
  for (std::string const name : {"metadata_5tuple_protocol2", "metadata_old_classes_protocol3", "sharded_tensor_2", "metadata_protocol5"}) {
    CAPTURE(name);
    std::string const bytes = golden::text_of(golden::root() / "pickle" / (name + ".pkl"));
    std::set<std::string> globals;
    auto const tree = Tree::parse(as_byte_span(bytes), [&](std::string_view module, std::string_view global) { return globals.insert(std::string{module} + '.' + std::string{global}), true; });
    Value const root = tree.root();
    CHECK(root.is_call_of("torch.distributed.checkpoint.metadata", "Metadata"));
    CHECK(root.by_newobj());
    CHECK(root.arguments().size() == 0);
    CHECK(globals.contains("torch.Size"));
    REQUIRE(root.state());
    CHECK(expanded_nodes(root, 10'000) > 100);
    int pieces = 0;
    root.state()->at("storage_data").for_each_pair([&](Value const& index, Value const& info) {
      CHECK(index.is_call_of("torch.distributed.checkpoint.metadata", "MetadataIndex"));
      CHECK(root.state()->at("state_dict_metadata").find(index.state()->at("fqn").text()));
      CHECK(info.state()->at("length").natural() > 0);
      CHECK(info.state()->at("relative_path").text().ends_with(".distcp"));
      ++pieces;
    });
    CHECK(pieces > 0);
    CHECK_FALSE(pickle_text(root).empty());
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      CAPTURE(n);
      REQUIRE(outcome_of([&] { Tree::parse(as_byte_span(bytes).first(n), everything); }) == "truncated");
    }
  }
}

TEST_CASE("Tree::parse: one list that CPython pickled with each of its protocols has the same plain values") {
  for (int protocol = 0; protocol <= 5; ++protocol) {
    CAPTURE(protocol);
    std::string const text = pickle_text(golden::text_of(golden::root() / "pickle" / ("values_protocol" + std::to_string(protocol) + ".pkl")));
    CHECK(text.starts_with("[None, True, 1, 300, -5, 1099511627776, 0x000000000000000040, float 1.5, 'text', '\xc3\xa9\xf0\x9f\x9a\x80', "));
    CHECK(text.find(protocol < 3 ? ", _codecs.encode('\xc3\xbf" : ", b'ff00', ") != std::string::npos);
    CHECK(text.find(", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {'a': 1, 'b': [2]}, ") != std::string::npos);
    CHECK(text.find("collections.OrderedDict") != std::string::npos);
    CHECK(text.ends_with(", {'a': 1, 'b': [2]}]"));
  }
}

TEST_CASE("expanded_nodes counts a value once for each of its places, and refuses more than the limit, deep nests and cycles") {
  auto const count = [](std::string const& bytes, std::uint64_t limit, std::uint32_t depth = 1000) {
    auto const tree = Tree::parse(as_byte_span(bytes), everything);
    return expanded_nodes(tree.root(), limit, depth);
  };
  auto const refused = [&](std::string const& bytes, std::uint64_t limit, std::uint32_t depth = 1000) { return outcome_of([&] { count(bytes, limit, depth); }) == "limit"; };
  CHECK(count("N.", 1) == 1);
  CHECK(count("N2\x86.", 3) == 3);
  CHECK(refused("N2\x86.", 2));
  CHECK(count("N2\x86\x32\x86.", 7) == 7);
  CHECK(count("ctorch\nSize\n)\x81Nb.", 6) == 6);   // the object, the global and its two names, the arguments, the state
  CHECK(count("N" + times(62, "2\x86") + ".", UINT64_MAX) == (std::uint64_t{1} << 63) - 1);
  CHECK(refused("N" + times(63, "2\x86") + ".", UINT64_MAX - 1));
  CHECK(refused("N" + times(500, "2\x86") + ".", 1'000'000));
  CHECK(count("N" + times(1000, "\x85") + ".", 2000) == 1001);
  CHECK(refused("N" + times(1001, "\x85") + ".", 2000));
  CHECK(refused("N" + times(1'000'000, "\x85") + ".", UINT64_MAX));
  CHECK(count("N\x85\x85.", 10, 2) == 3);
  CHECK(refused("N\x85\x85.", 10, 1));
  CHECK(refused("]2a.", 1'000'000));                      // a list in itself
  CHECK(refused("}2N\x32s0.", 1'000'000) == false);       // {None: None}
  CHECK(refused("}\x94Nh" + lit("\0") + "s.", 1'000'000));   // a dict in itself
  CHECK(refused("ctorch\nSize\n)\x81\x94h" + lit("\0") + "b.", 1'000'000));   // an object that is its own state
  CHECK(refused("](]\x94h" + lit("\0") + "ae.", 1'000'000));
  CHECK(outcome_of([&] { count("]\x94\x85h" + lit("\0") + "\x86.", 10); }) == "ok");   // the same list twice, but not in itself
}

TEST_CASE("Writer: integers have the opcode that CPython gives them in protocol 2") {
  struct Row {
    std::int64_t value;
    std::string bytes;
  };
  for (auto const& row : std::vector<Row>{{0, lit("K\0")}, {255, "K\xff"}, {256, lit("M\0\1")}, {65535, "M\xff\xff"}, {65536, "J" + u32(65536)}, {-1, "J" + u32(0xFFFFFFFF)}, {INT32_MAX, "J" + u32(INT32_MAX)},
                                          {INT32_MIN, "J" + u32(0x80000000)}, {std::int64_t{1} << 31, lit("\x8a\5\0\0\0\x80\0")}, {INT64_C(-2147483649), lit("\x8a\5\xff\xff\xff\x7f\xff")},
                                          {(std::int64_t{1} << 39) - 1, lit("\x8a\5\xff\xff\xff\xff\x7f")}, {std::int64_t{1} << 39, lit("\x8a\6\0\0\0\0\x80\0")}, {-(std::int64_t{1} << 39), lit("\x8a\5\0\0\0\0\x80")},
                                          {INT64_MAX, lit("\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f")}, {INT64_MIN, lit("\x8a\x08\0\0\0\0\0\0\0\x80")}}) {
    CAPTURE(row.value);
    CHECK(text_of(Writer{}.integer(row.value).take()) == "\x80\x02" + row.bytes + ".");
    CHECK(pickle_text("\x80\x02" + row.bytes + ".") == std::to_string(row.value));
  }
  CHECK(text_of(Writer{}.natural(UINT64_MAX).take()) == "\x80\x02\x8a\x09" + times(8, "\xff") + lit("\0") + ".");
}

TEST_CASE("Writer: texts and globals that come again are recalled from the memo, also when there are many") {
  CHECK(text_of(Writer{}.repeated_text("a").repeated_text("b").repeated_text("a").tuple3().take()) == lit("\x80\x02X\1\0\0\0aq\0X\1\0\0\0bq\1h\0\x87."));
  CHECK(text_of(Writer{}.global("m", "n").repeated_text("m").global("m", "n").tuple3().take()) == lit("\x80\x02" "cm\nn\nq\0X\1\0\0\0mq\1h\0\x87."));
  CHECK(text_of(Writer{}.repeated_text("").repeated_text("").tuple2().take()) == lit("\x80\x02X\0\0\0\0q\0h\0\x86."));
  Writer writer;
  writer.empty_list().mark();
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 1000; ++i) writer.repeated_text("name " + std::to_string(i));
  }
  Bytes const bytes = writer.appends().take();
  auto const tree = Tree::parse(bytes, everything);
  for (std::size_t i = 0; i < 1000; ++i) {
    CHECK(tree.root().item(i).text() == "name " + std::to_string(i));
    CHECK(tree.root().item(i).id() == tree.root().item(1000 + i).id());
  }
}

TEST_CASE("Writer: bytes are a call of encode, which both unpicklers of PyTorch allow") {
  CHECK(text_of(Writer{}.bytes(as_byte_span("a\xff")).take()) == lit("\x80\x02" "c_codecs\nencode\nq\0X\3\0\0\0a\xc3\xbfX\6\0\0\0latin1q\1\x86R."));
  CHECK(text_of(Writer{}.bytes({}).take()) == lit("\x80\x02" "c_codecs\nencode\nq\0X\0\0\0\0X\6\0\0\0latin1q\1\x86R."));
}

TEST_CASE("Writer: what a pickle cannot hold is refused") {
  CHECK(outcome_of([] { Writer{}.text("\xff"); }) == "bad_utf8");
  CHECK(outcome_of([] { Writer{}.repeated_text("\xed\xa0\x80"); }) == "bad_utf8");
  CHECK(outcome_of([] { Writer{}.global("a\nb", "c"); }) == "invalid_argument");
  CHECK(outcome_of([] { Writer{}.global("a", ""); }) == "invalid_argument");
  CHECK(outcome_of([] { Writer{}.global("a", "\xff"); }) == "bad_utf8");
}

TEST_CASE("law: what Writer has written is read back, value for value") {
  std::uint64_t const first = test::first_seed();
  for (std::uint64_t seed = first; seed < first + 2000; ++seed) {
    CAPTURE(seed);
    test::Random random{seed};
    Writer writer;
    writer.empty_list().mark();
    std::string expected;
    for (std::int64_t n = random.between(0, 6); n > 0; --n) expected += (expected.empty() ? "" : ", ") + write_random(writer, random, 4);
    Bytes const bytes = writer.appends().take();
    REQUIRE(pickle_text(text_of(bytes)) == '[' + expected + ']');
  }
}
