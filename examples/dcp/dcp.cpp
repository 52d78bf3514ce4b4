// SPDX-License-Identifier: Apache-2.0
// dcp: looks at checkpoints, verifies, compares and converts them. It knows each format by looking: safetensors (plain and quantized), GGUF, PyTorch's distributed
// checkpoints, files of torch.save.
//
//   dcp ls CHECKPOINT [--json]                names, dtypes, shapes, files, sizes
//   dcp verify CHECKPOINT                     every byte that has a checksum; exit status 0 if all is well, 1 if not
//   dcp diff A B                              across formats; exit status 0 if equal, 1 if not, 2 if they cannot be compared
//   dcp cp FROM TO [--to safetensors|torch]   conversion; also under mpirun
//   dcp layout SHAPE PLACEMENT MESH           which rank holds what:  dcp layout 8x6 S0,S1 2x2
#include "diff.hpp"
#include "formats.hpp"
#include "layout.hpp"

#include <CLI/CLI.hpp>
#include <dcp/dcp.hpp>
#ifdef DCP_TOOL_MPI
#include <dcp/comm/mpi.hpp>
#endif
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <unistd.h>

namespace {

using tool::Format;

/// A bar on standard error, if that is a terminal.
dcp::ProgressCallback progress_bar(bool wanted) {
  if (!wanted || ::isatty(STDERR_FILENO) == 0) return {};
  return [](dcp::Progress const& progress) {
    constexpr std::uint64_t width = 40;
    std::uint64_t const total = std::max<std::uint64_t>(1, progress.total), full = std::min(width, progress.done * width / total);
    std::cerr << '\r' << std::left << std::setw(8) << progress.phase << " [" << std::string(static_cast<std::size_t>(full), '#') << std::string(static_cast<std::size_t>(width - full), '.') << "] "
              << dcp::human_bytes(progress.done) << " of " << dcp::human_bytes(progress.total) << "   " << std::flush;
    if (progress.done >= progress.total) std::cerr << "\r\x1b[K" << std::flush;
  };
}

template <class S>
dcp::LoadOptions<S> reading(bool bar) {
  dcp::LoadOptions<S> options;
  options.progress = progress_bar(bar);
  if constexpr (requires { options.storage.opaque_objects; }) options.storage.opaque_objects = true;   // to be listed; what is converted is asked for without it
  return options;
}

std::string joined(std::vector<std::string> const& list, char const* between) {
  std::string out;
  for (auto const& item : list) out += (out.empty() ? "" : between) + item;
  return out;
}

std::string text_of(dcp::Extents const& shape) {
  std::ostringstream text;
  text << shape;
  return text.str();
}

std::string shortened(std::string text, std::size_t most) {
  if (text.size() > most) text.resize(most), text += "...";
  return text;
}

int list(tool::fs::path const& place, bool json) {
  Format const format = tool::format_of(place);
  dcp::SelfComm self;
  dcp::Contents const contents = tool::with_storage(format, [&]<class S>() { return dcp::contents<S>(self, place, reading<S>(false)); });
  std::uint64_t stored = 0, files = 0;
  for (auto const& tensor : contents.tensors) stored += tensor.stored_bytes;
  for (auto const& [name, size] : contents.files) files += size;
  if (json) {
    nlohmann::json out{{"format", tool::to_string(format)}, {"foreign", contents.foreign}, {"tensor_bytes", stored}, {"warnings", contents.warnings}};
    out["tensors"] = out["values"] = out["ties"] = out["files"] = nlohmann::json::object();
    for (auto const& tensor : contents.tensors) {
      auto& entry = out["tensors"][tensor.name] = {{"dtype", dcp::to_string(tensor.dtype)}, {"shape", std::vector<std::int64_t>(tensor.shape.begin(), tensor.shape.end())}, {"bytes", tensor.stored_bytes}, {"files", tensor.files}};
      if (!tensor.scheme.empty()) entry["scheme"] = tensor.scheme, entry["parts"] = tensor.parts;
    }
    for (auto const& [name, value] : contents.values) out["values"][name] = nlohmann::json::parse(dcp::to_json(value), nullptr, false);
    for (auto const& [name, kept] : contents.ties) out["ties"][name] = kept;
    for (auto const& [name, size] : contents.files) out["files"][name] = size;
    std::cout << out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
    return 0;
  }
  std::size_t name_width = 4, shape_width = 5, type_width = 5;
  auto const type = [](dcp::TensorContents const& tensor) { return tensor.scheme.empty() ? std::string{dcp::to_string(tensor.dtype)} : tensor.scheme; };
  for (auto const& tensor : contents.tensors) {
    name_width = std::max(name_width, std::min<std::size_t>(60, tensor.name.size()));
    shape_width = std::max(shape_width, text_of(tensor.shape).size());
    type_width = std::max(type_width, type(tensor).size());
  }
  for (auto const& tensor : contents.tensors)
    std::cout << std::left << std::setw(static_cast<int>(name_width)) << tensor.name << "  " << std::setw(static_cast<int>(type_width)) << type(tensor) << "  " << std::setw(static_cast<int>(shape_width)) << text_of(tensor.shape) << "  "
              << std::right << std::setw(10) << dcp::human_bytes(tensor.stored_bytes) << "  " << shortened(joined(tensor.files, " "), 80) << '\n';
  for (auto const& [name, kept] : contents.ties) std::cout << std::left << std::setw(static_cast<int>(name_width)) << name << "  = " << kept << '\n';
  for (auto const& [name, value] : contents.values) std::cout << std::left << std::setw(static_cast<int>(name_width)) << name << "  " << shortened(dcp::to_json(value), 100) << '\n';
  for (auto const& warning : contents.warnings) std::cout << "warning: " << warning << '\n';
  std::cout << tool::to_string(format) << (contents.foreign ? "" : ", with checksums") << ": " << contents.tensors.size() << " tensors of " << dcp::human_bytes(stored) << ", " << contents.values.size() << " values, " << contents.files.size()
            << " files of " << dcp::human_bytes(files) << '\n';
  return 0;
}

int verify(tool::fs::path const& place) {
  Format const format = tool::format_of(place);
  dcp::SelfComm self;
  dcp::Report const report = tool::with_storage(format, [&]<class S>() { return dcp::verify<S>(self, place, reading<S>(true)); });
  for (auto const& warning : report.warnings) std::cout << "warning: " << warning << '\n';
  for (auto const& twice : report.duplicates) std::cout << "stored twice: " << twice << '\n';
  std::cout << "verified: " << dcp::human_bytes(report.verified_bytes) << " of " << tool::to_string(format) << ", " << report.tensors << " tensors, " << report.values << " values";
  if (report.unverified_bytes > 0) std::cout << "; " << dcp::human_bytes(report.unverified_bytes) << " have no checksum, of them only sizes and headers were compared";
  std::cout << '\n';
  return 0;
}

/// Whether both are saves of this library with the same files, so that nothing need be read.
bool same_by_checksum(tool::fs::path const& a, tool::fs::path const& b) {
  auto const files = [](tool::fs::path const& place) {
    std::map<std::string, nlohmann::json> sums;
    auto const record = nlohmann::json::parse(tool::text_of(place / "dcp.json", std::size_t{1} << 30), nullptr, false);
    if (!record.is_object() || !record.contains("files") || !record["files"].is_array()) return sums;
    for (auto const& file : record["files"]) {
      if (!file.is_object() || !file.value("data", false)) continue;
      if (!file.contains("crc64")) return std::map<std::string, nlohmann::json>{};
      sums[file.value("path", "")] = {file["size"], file["crc64"]};
    }
    return sums;
  };
  auto const left = files(a), right = files(b);
  return !left.empty() && left == right;
}

int diff(tool::fs::path const& a, tool::fs::path const& b) {
  auto const open = [](tool::fs::path const& place) { return tool::with_storage(tool::format_of(place), [&]<class S>() { return dcp::CheckpointReader::open<S>(place, reading<S>(false)); }); };
  auto left = open(a), right = open(b);
  bool const by_checksum = same_by_checksum(a, b);
  std::uint64_t differences = 0;
  auto const say = [&](std::string const& sentence) { ++differences, std::cout << sentence << '\n'; };
  std::map<std::string, dcp::TensorContents const*> theirs;
  for (auto const& tensor : right.contents().tensors) theirs[tensor.name] = &tensor;
  for (auto const& tensor : left.contents().tensors) {
    auto const at = theirs.find(tensor.name);
    if (at == theirs.end()) {
      say(tensor.name + ": only in " + a.string());
      continue;
    }
    dcp::TensorContents const& other = *at->second;
    theirs.erase(at);
    if (!(tensor.shape == other.shape)) {
      say(tensor.name + ": shape " + text_of(tensor.shape) + " and " + text_of(other.shape));
      continue;
    }
    if (tensor.dtype != other.dtype) say(tensor.name + ": " + std::string{dcp::to_string(tensor.dtype)} + " and " + std::string{dcp::to_string(other.dtype)});
    if (by_checksum) continue;
    if (auto const found = tool::compare_tensors(left, right, tensor, other)) {
      std::ostringstream text;
      text << tensor.name << ": " << found->count << " of " << tensor.shape.elements() << " elements differ, the first is number " << found->first << ", the largest difference " << found->largest;
      say(text.str());
    }
  }
  for (auto const& [name, tensor] : theirs) say(name + ": only in " + b.string());
  std::map<std::string, std::string> values;
  for (auto const& [name, value] : right.contents().values) values[name] = dcp::to_json(value);
  for (auto const& [name, value] : left.contents().values) {
    auto const at = values.find(name);
    if (at == values.end()) {
      say(name + ": only in " + a.string());
      continue;
    }
    if (at->second != dcp::to_json(value)) say(name + ": " + shortened(dcp::to_json(value), 60) + " and " + shortened(at->second, 60));
    values.erase(at);
  }
  for (auto const& [name, value] : values) say(name + ": only in " + b.string());
  std::cout << (differences == 0 ? "equal" : std::to_string(differences) + " differences") << ": " << left.contents().tensors.size() << " tensors" << (by_checksum ? ", by their checksums" : ", by their values") << '\n';
  return differences == 0 ? 0 : 1;
}

struct Copy {
  tool::fs::path from, to;
  std::string format = "safetensors";
  std::uint64_t max_file_bytes = 0, memory_bytes = 0;
  std::vector<std::string> only;
  std::string decode_to = "BF16";
  bool replace = false;
};

template <class From, class To, class C>
dcp::Report copy_as(C& world, Copy const& what) {
  dcp::ConvertOptions<From, To> options;
  options.only = what.only;
  if (!dcp::parse_dtype(what.decode_to, options.decode_to)) throw dcp::Error{dcp::ErrorCode::invalid_argument, "\"" + what.decode_to + "\" is no dtype"};
  options.save.if_exists = what.replace ? dcp::IfExists::replace : dcp::IfExists::fail;
  options.save.progress = progress_bar(world.rank() == 0);
  if (what.memory_bytes > 0) options.save.memory_bytes = what.memory_bytes;
  if constexpr (requires { options.save.storage.max_file_bytes; })
    if (what.max_file_bytes > 0) options.save.storage.max_file_bytes = what.max_file_bytes;
  return dcp::convert<From, To>(world, what.from, what.to, options);
}

template <class C>
int copy(C& world, Copy const& what) {
  dcp::Report const report = tool::with_storage(tool::format_of(what.from), [&]<class From>() { return what.format == "torch" ? copy_as<From, dcp::TorchDcp>(world, what) : copy_as<From, dcp::SafeTensors>(world, what); });
  if (world.rank() != 0) return 0;
  for (auto const& warning : report.warnings) std::cout << "warning: " << warning << '\n';
  std::cout << "wrote " << report.tensors << " tensors of " << dcp::human_bytes(report.tensor_bytes) << " and " << report.values << " values to " << what.to.string() << '\n';
  return 0;
}

#ifdef DCP_TOOL_MPI
bool under_mpirun() {
  for (auto const* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"})
    if (std::getenv(name) != nullptr) return true;
  return false;
}
int copy_under_mpirun(Copy const& what) {
  int provided = 0, status = 1;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  try {
    dcp::MpiComm world{MPI_COMM_WORLD};
    status = copy(world, what);
  } catch (std::exception const& error) {   // the same on all ranks
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank == 0) std::cerr << error.what() << '\n';
  }
  MPI_Finalize();
  return status;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Looks at checkpoints, verifies, compares and converts them: safetensors, quantized or not, GGUF, PyTorch's distributed checkpoints, files of torch.save"};
  app.require_subcommand(1);
  tool::fs::path place, other;
  bool json = false;
  Copy what;
  std::string shape, placement, mesh;

  auto* const ls = app.add_subcommand("ls", "Names, dtypes, shapes, files and sizes, from the headers alone");
  ls->add_option("checkpoint", place)->required();
  ls->add_flag("--json", json, "for programs");
  auto* const check = app.add_subcommand("verify", "Reads everything and compares it with its checksums");
  check->add_option("checkpoint", place)->required();
  auto* const compare = app.add_subcommand("diff", "What differs between two checkpoints, whatever their formats");
  compare->add_option("a", place)->required();
  compare->add_option("b", other)->required();
  auto* const cp = app.add_subcommand("cp", "Converts; run it under mpirun to share the work");
  cp->add_option("from", what.from)->required();
  cp->add_option("to", what.to, "a directory")->required();
  cp->add_option("--to", what.format, "safetensors or torch")->check(CLI::IsMember({"safetensors", "torch"}))->capture_default_str();
  cp->add_option("--max-file-bytes", what.max_file_bytes, "of tensor data per file of safetensors: 5GB")->transform(CLI::AsSizeValue(false));
  cp->add_option("--only", what.only, "entries of these names or below them; may be given several times");
  cp->add_option("--decode-to", what.decode_to, "what quantized tensors become: BF16, F16, F32")->capture_default_str();
  cp->add_option("--memory", what.memory_bytes, "of each rank: 256MB")->transform(CLI::AsSizeValue(false));
  cp->add_flag("--replace", what.replace, "what is at TO");
  auto* const draw = app.add_subcommand("layout", "Which rank holds what of a tensor:  dcp layout 8x6 S0,S1 2x2");
  draw->add_option("shape", shape, "4096x1024")->required();
  draw->add_option("placement", placement, "of each axis of the mesh: S0 (shard dimension 0) or R (replicate)")->required();
  draw->add_option("mesh", mesh, "2x4")->required();
  CLI11_PARSE(app, argc, argv);

  bool const is_diff = compare->parsed();
  try {
    if (ls->parsed()) return list(place, json);
    if (check->parsed()) return verify(place);
    if (is_diff) return diff(place, other);
    if (draw->parsed()) return tool::draw_layout(std::cout, tool::layout_of(shape, placement, mesh)), 0;
#ifdef DCP_TOOL_MPI
    if (under_mpirun()) return copy_under_mpirun(what);
#endif
    dcp::SelfComm self;
    return copy(self, what);
  } catch (std::exception const& error) {
    std::cerr << error.what() << '\n';
    return is_diff ? 2 : 1;
  }
}
