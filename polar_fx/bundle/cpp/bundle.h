// A bundle's files: checked before they are used, and read into what the runner links. The format is that of docs/export.md.
//
// Shape legend: L allocated KV length.
#pragma once

#include <ATen/Tensor.h>
#include <ATen/Version.h>
#include <ATen/ops/empty_strided.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "refused.h"
#include "sha256.h"
#include "weight_memory.h"

namespace fs = std::filesystem;

constexpr int64_t kFormat = 3;  // the newest format of manifests that is read here
constexpr std::streamoff kMaxJsonBytes = 64 << 20;

// How a weight is laid out for the code that reads it.
struct Layout {
  std::vector<int64_t> size, stride;
  at::ScalarType dtype;
};

// One call of a region: what it takes beside hidden state and KV slots.
struct Call {
  std::string target;
  std::vector<size_t> sides;  // places in the list of graph inputs and prologue results
  std::vector<std::pair<std::string, Layout>> weights;
};

// What a layer keeps of a row however long it is, [1, size...], such as the last inputs of a convolution.
struct StateSpec {
  std::vector<int64_t> size;
  at::ScalarType dtype;
};

// One part of a slot that grows with the row.
struct ColumnsSpec {
  int64_t heads, size;
  at::ScalarType dtype;
};

// The slot of a layer's step: keys and values, unless it has no heads, then further columns, and then states.
struct KvSpec {
  std::vector<ColumnsSpec> columns;
  at::ScalarType dtype;
  std::vector<StateSpec> states;

  // As `polar_fx.library.symbols.SymbolTable.ends_in_kv_writes` says: a state must not see a token twice.
  bool ends_in_kv_writes() const { return !columns.empty() && states.empty(); }
};

inline at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float64", at::kDouble}, {"F64", at::kDouble}, {"float32", at::kFloat}, {"F32", at::kFloat},
      {"float16", at::kHalf}, {"F16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"BF16", at::kBFloat16},
      {"float8_e4m3fn", at::kFloat8_e4m3fn}, {"F8_E4M3", at::kFloat8_e4m3fn},
      {"float8_e5m2", at::kFloat8_e5m2}, {"F8_E5M2", at::kFloat8_e5m2},
      {"int64", at::kLong}, {"I64", at::kLong}, {"int32", at::kInt}, {"I32", at::kInt}, {"int16", at::kShort},
      {"I16", at::kShort}, {"int8", at::kChar}, {"I8", at::kChar}, {"uint8", at::kByte}, {"U8", at::kByte},
      {"bool", at::kBool}, {"BOOL", at::kBool}};
  const auto found = known.find(name);
  if (found == known.end()) throw JsonError("unknown dtype " + name);
  return found->second;
}

// As `polar_fx.runtime.code_key.target_of` says it: regions hold instructions of the processor they were compiled on.
inline std::string this_processor() {
  utsname system{};
  uname(&system);
  std::ifstream info("/proc/cpuinfo");
  std::string line;
  while (std::getline(info, line)) {
    std::string start = line.substr(0, 8);
    std::transform(start.begin(), start.end(), start.begin(), [](unsigned char c) { return std::tolower(c); });
    if (!start.starts_with("flags") && !start.starts_with("features")) continue;
    const std::string kind = std::string(system.sysname) + " " + system.machine + " " + at::get_cpu_capability();
    return kind + " " + Sha256::of(line).substr(0, 8);
  }
  throw Refused("/proc/cpuinfo", "does not tell the processor's instructions; the runner needs Linux for that");
}

class Bundle {
 public:
  // With `hash`, every file that is used is hashed; without, only its size is looked at.
  Bundle(const fs::path& folder, bool hash) : folder_(folder), hash_(hash) {
    if (!fs::is_directory(folder)) throw Refused(folder.string(), "is not a folder; name the one that polar_fx wrote");
    reading("manifest.json", [&](const Json& manifest) { read_manifest(manifest); });
    reading("symbols.json", [&](const Json& table) { read_table(table); });
    reading("generation.json", [&](const Json& defaults) {
      if (!defaults.has("eos_token_id") || defaults["eos_token_id"].is_null()) return;
      const Json& ends = defaults["eos_token_id"];
      if (!ends.is_list()) end_tokens.push_back(ends.whole());
      else for (const Json& end : ends.list()) end_tokens.push_back(end.whole());
    });
  }

  int64_t depth, vocab_size, max_length, prefill_chunk;
  int64_t kv_length = 0;         // columns of a KV slot; 0: keys and values lie in blocks
  int64_t frequency_switch = 0;  // past so many tokens, a row is computed anew; 0: never
  std::vector<std::string> programs;  // the first is the default one
  std::vector<int64_t> end_tokens;
  Call prologue, epilogue;
  std::vector<Call> layers;
  std::vector<KvSpec> kv_specs;  // a layer's
  std::vector<size_t> owners;    // whose slot a layer's steps take: its own, or that of the layer whose keys and values it only reads

  // The package of a region for one row, and one token or many.
  std::string package(const std::string& region, bool many_tokens) {
    const std::string shapes = std::string("B=1 T=") + (many_tokens ? "2+" : "1") + " L=" +
                               (kv_length ? std::to_string(kv_length) : "any");
    const auto found = regions_.find({region, shapes});
    if (found == regions_.end()) throw Refused(manifest_path(), "names no region " + region + " for " + shapes);
    return checked(found->second).string();
  }

  // Checks every file but the tokenizer's, and that the weights are what the code takes, before any code is loaded.
  void check_files() {
    for (const auto& [name, file] : files_)
      if (!name.starts_with("tokenizer/")) checked(name);
    open_weights();
    std::vector<const Call*> calls = {&prologue, &epilogue};
    for (const Call& call : layers) calls.push_back(&call);
    for (const Call* call : calls)
      for (const auto& [name, layout] : call->weights) find_weight(stored_name(name), layout);
  }

  // A weight, in memory of its own and laid out as the code reads it; read at first use, once under all its names.
  at::Tensor weight(const std::string& name, const Layout& layout) {
    const std::string& stored = stored_name(name);
    at::Tensor& tensor = weights_[stored];
    if (!tensor.defined()) tensor = read_weight(stored, layout);
    if (tensor.sizes() != layout.size || tensor.strides() != layout.stride || tensor.scalar_type() != layout.dtype)
      throw Refused((folder_ / "symbols.json").string(), "takes " + name + " to be laid out in two ways");
    return tensor;
  }

 private:
  struct File {
    int64_t num_bytes;
    std::string sha256;
    bool is_checked = false;
  };
  struct Stored {
    std::vector<int64_t> size;
    at::ScalarType dtype;
    int64_t begin, end;  // bytes behind the header
  };

  // Parses one JSON file and hands it on; what is wrong with it is reported under its name.
  template <typename Read>
  void reading(const std::string& name, Read read) {
    const fs::path path = name == "manifest.json" ? plain(name) : checked(name);
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (file.tellg() > kMaxJsonBytes) throw Refused(path.string(), "is larger than any such file");
    std::string text(static_cast<size_t>(std::max<std::streamoff>(0, file.tellg())), '\0');
    file.seekg(0);
    if (!file.read(text.data(), static_cast<std::streamsize>(text.size()))) throw Refused(path.string(), "cannot be read");
    try {
      read(Json::parse(text));
    } catch (const JsonError& error) {
      throw Refused(path.string(), error.what());
    }
  }

  void read_manifest(const Json& manifest) {
    const std::string path = manifest_path();
    if (!manifest.has("polar_fx_bundle")) throw Refused(path, "has no format version: it is not the manifest of a bundle");
    if (const int64_t format = manifest["polar_fx_bundle"].whole(); format < 1 || format > kFormat)
      throw Refused(path, "has format " + std::to_string(format) + ", and this runner reads formats up to " +
                              std::to_string(kFormat) + "; build the runner of the polar_fx that wrote it");
    const Json& target = manifest["target"];
    const auto require = [&](const char* field, const std::string& own) {
      if (const std::string& its = target[field].text(); its != own)
        throw Refused(path, std::string("is of a bundle for ") + field + " '" + its + "', and this is '" + own +
                                "'; export it on such a machine with this torch build");
    };
    require("device", "cpu");
    require("backend", "aot_inductor");
    require("torch", POLAR_TORCH);
    require("processor", this_processor());
    depth = manifest["model"]["depth"].size();
    vocab_size = manifest["model"]["vocab_size"].size();
    const Json& limits = manifest["limits"];
    max_length = limits["max_length"].size();
    if (limits.has("kv_length")) kv_length = limits["kv_length"].size();
    prefill_chunk = limits["prefill_chunk"].size();
    if (limits.has("frequency_switch")) frequency_switch = limits["frequency_switch"].size();
    if (depth < 1 || max_length < 1 || (kv_length && kv_length <= max_length) || prefill_chunk < 1) throw JsonError("its limits make no sense");
    for (const Json& program : manifest["programs"].list()) programs.push_back(program.text());
    if (programs.empty()) throw JsonError("it names no program");
    for (const auto& [name, other] : manifest["ties"].object()) ties_[name] = other.text();
    for (const Json& file : manifest["files"].list()) {
      const std::string& name = file["path"].text();
      files_[name] = {file["bytes"].size(), file["sha256"].text()};
      if (file.has("region")) regions_[{file["region"].text(), file["shapes"].text()}] = name;
    }
  }

  void read_table(const Json& table) {
    prologue = read_call(table, table["prologue"]);
    epilogue = read_call(table, table["epilogue"]);
    for (const Json& call : table["layers"].list()) layers.push_back(read_call(table, call));
    for (const Json& spec : table["kv_specs"].list()) {
      KvSpec& own = kv_specs.emplace_back();
      if (const int64_t heads = spec["heads"].size(); heads > 0)
        for (const char* size : {"key_size", "value_size"})
          own.columns.push_back({heads, spec[size].size(), dtype_of(spec["dtype"].text())});
      if (spec.has("more_keys"))
        for (const Json& keys : spec["more_keys"].list())
          own.columns.push_back({keys["heads"].size(), keys["size"].size(), dtype_of(keys["dtype"].text())});
      if (!spec.has("states")) continue;
      for (const Json& state : spec["states"].list()) {
        StateSpec made{{}, dtype_of(state["dtype"].text())};
        for (const Json& size : state["size"].list()) made.size.push_back(size.size());
        own.states.push_back(made);
      }
      if (kv_length == 0) throw JsonError("it has layers that keep states, which run in slots, and code for blocks");
    }
    if (layers.size() != static_cast<size_t>(depth) || kv_specs.size() != layers.size())
      throw JsonError("it has " + std::to_string(layers.size()) + " layers, the manifest says " + std::to_string(depth));
    for (size_t layer = 0; layer < layers.size(); ++layer) owners.push_back(layer);
    if (!table.has("owners")) return;
    for (const auto& [name, owner] : table["owners"].object()) {
      const auto reader = static_cast<size_t>(Json::parse(name).size()), own = static_cast<size_t>(owner.size());
      if (reader >= layers.size() || own >= reader || owners[own] != own || !kv_specs[reader].columns.empty() ||
          !kv_specs[reader].states.empty() || !kv_specs[own].states.empty())
        throw JsonError("it lets layer " + name + " read the slot of layer " + std::to_string(own));
      owners[reader] = own;
    }
  }

  static Call read_call(const Json& table, const Json& call) {
    Call made{call["target"].text(), {}, {}};
    for (const Json& side : call["sides"].list()) made.sides.push_back(static_cast<size_t>(side.size()));
    std::vector<Layout> layouts;
    size_t num_sides = 0;
    for (const Json& operand : table["bodies"][made.target]["operands"].list()) {
      const std::string& role = operand["role"].text();
      num_sides += role == "side" || role == "input";
      if (role != "weight") continue;
      Layout layout{{}, {}, dtype_of(operand["dtype"].text())};
      for (const Json& size : operand["size"].list()) layout.size.push_back(Json::parse(size.text()).size());
      for (const Json& stride : operand["stride"].list()) layout.stride.push_back(Json::parse(stride.text()).size());
      layouts.push_back(layout);
    }
    const auto& names = call["weights"].list();
    if (names.size() != layouts.size() || made.sides.size() != num_sides)
      throw JsonError("a call of " + made.target + " does not pass what its body takes");
    for (size_t i = 0; i < names.size(); ++i) made.weights.emplace_back(names[i].text(), layouts[i]);
    return made;
  }

  void open_weights() {
    const fs::path path = checked("weights.safetensors");
    weights_file_.open(path, std::ios::binary);
    unsigned char length[8] = {};
    weights_file_.read(reinterpret_cast<char*>(length), sizeof length);
    uint64_t num_bytes = 0;
    for (int i = 7; i >= 0; --i) num_bytes = num_bytes << 8 | length[i];
    const auto total = static_cast<uint64_t>(files_["weights.safetensors"].num_bytes);
    if (!weights_file_ || total < 8 || num_bytes > total - 8 || num_bytes > static_cast<uint64_t>(kMaxJsonBytes))
      throw Refused(path.string(), "is no safetensors file");
    std::string header(num_bytes, '\0');
    weights_file_.read(header.data(), static_cast<std::streamsize>(num_bytes));
    first_byte_ = static_cast<int64_t>(8 + num_bytes);
    try {
      const Json tensors = Json::parse(header);
      for (const auto& [name, entry] : tensors.object()) {
        if (name == "__metadata__") continue;
        const auto& range = entry["data_offsets"].list();
        if (range.size() != 2) throw JsonError("a tensor without its two offsets");
        Stored stored{{}, dtype_of(entry["dtype"].text()), range[0].size(), range[1].size()};
        for (const Json& size : entry["shape"].list()) stored.size.push_back(size.size());
        if (stored.begin > stored.end || stored.end > static_cast<int64_t>(total) - first_byte_)
          throw JsonError("a tensor lies beyond the end of the file");
        stored_[name] = stored;
      }
    } catch (const JsonError& error) {
      throw Refused(path.string(), error.what());
    }
  }

  const std::string& stored_name(const std::string& name) const {
    const auto tie = ties_.find(name);
    return tie == ties_.end() ? name : tie->second;
  }

  const Stored& find_weight(const std::string& name, const Layout& layout) const {
    const std::string path = (folder_ / "weights.safetensors").string();
    const auto found = stored_.find(name);
    if (found == stored_.end()) throw Refused(path, "holds no tensor " + name);
    const Stored& stored = found->second;
    if (stored.size != layout.size || stored.dtype != layout.dtype)
      throw Refused(path, "holds " + name + " in another size or dtype than the code takes");
    return stored;
  }

  at::Tensor read_weight(const std::string& name, const Layout& layout) {
    const std::string path = (folder_ / "weights.safetensors").string();
    const Stored& stored = find_weight(name, layout);
    const int64_t num_bytes = stored.end - stored.begin;
    if (static_cast<int64_t>(WeightMemory::bytes_of(stored.size, stored.dtype)) != num_bytes)
      throw Refused(path, "holds too many or too few bytes of " + name);
    const at::Tensor dense = weight_memory_.take(stored.size, stored.dtype);
    weights_file_.seekg(first_byte_ + stored.begin);
    if (!weights_file_.read(static_cast<char*>(dense.data_ptr()), num_bytes)) throw Refused(path, "cannot be read");
    if (dense.strides() == layout.stride) return dense;
    return at::empty_strided(layout.size, layout.stride, dense.options()).copy_(dense);
  }

  // A file of the manifest, after it was held against what that says of it.
  fs::path checked(const std::string& name) {
    const auto found = files_.find(name);
    if (found == files_.end()) throw Refused(manifest_path(), "does not name " + name);
    const fs::path path = plain(name);
    File& file = found->second;
    if (file.is_checked) return path;
    if (const auto size = static_cast<int64_t>(fs::file_size(path)); size != file.num_bytes)
      throw Refused(path.string(), std::string("is ") + (size < file.num_bytes ? "truncated" : "longer than it was") + ": " +
                                       std::to_string(size) + " bytes, the manifest says " + std::to_string(file.num_bytes));
    if (hash_ && digest_of(path) != file.sha256)
      throw Refused(path.string(), "was changed or exchanged: its sha256 is not the one in the manifest");
    file.is_checked = true;
    return path;
  }

  // The place of a file, which must be a plain one in the bundle's folder and not be reached through a link.
  fs::path plain(const std::string& name) const {
    fs::path path = folder_;
    for (const fs::path& part : fs::path(name)) {
      if (part.is_absolute() || part == ".." || part.empty()) throw Refused(manifest_path(), "names a path " + name);
      path /= part;
      const fs::file_status status = fs::symlink_status(path);
      if (!fs::exists(status)) throw Refused(path.string(), "is missing");
      if (fs::is_symlink(status)) throw Refused(path.string(), "is a symbolic link, which could lead out of the bundle");
    }
    if (!fs::is_regular_file(path)) throw Refused(path.string(), "is not a plain file");
    return path;
  }

  std::string manifest_path() const { return (folder_ / "manifest.json").string(); }

  static std::string digest_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    Sha256 hash;
    std::vector<char> part(1 << 20);
    while (file) {
      file.read(part.data(), static_cast<std::streamsize>(part.size()));
      hash.update(part.data(), static_cast<size_t>(file.gcount()));
    }
    if (!file.eof()) throw Refused(path.string(), "cannot be read");
    return hash.hex();
  }

  fs::path folder_;
  bool hash_;
  std::map<std::string, File> files_;
  std::map<std::pair<std::string, std::string>, std::string> regions_;  // name and shapes -> path
  std::map<std::string, std::string> ties_;                             // a tensor that is another one -> that one
  std::ifstream weights_file_;
  int64_t first_byte_ = 0;
  std::map<std::string, Stored> stored_;
  WeightMemory weight_memory_;
  std::map<std::string, at::Tensor> weights_;
};
