// polar_run: greedy generation from a polar_fx bundle, without Python. See docs/export.md.
//
// Shape legend: B batch (1 here), T tokens, L KV columns, P blocks of a store, W blocks of the row, H KV heads, E head size,
// V vocabulary.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <iostream>
#include <optional>

#include "bundle.h"
#include "program.h"

using at::Tensor;
using Tensors = std::vector<Tensor>;

// transformers registers this operator in Python, and mixtures of experts call it where no kernel of ours took its place:
// the rows [S, I] of `input`, sorted by expert, times the expert's own matrix of `weight` [E, I, O]; the rows of expert e
// end before `offs`[e].
Tensor grouped_mm(const Tensor& input, const Tensor& weight, const Tensor& offs) {
  Tensor output = at::zeros({input.size(0), weight.size(2)}, input.options());
  const Tensor ends = offs.to(at::kLong).contiguous();
  for (int64_t expert = 0, start = 0; expert < ends.size(0); ++expert) {
    const int64_t end = ends.const_data_ptr<int64_t>()[expert];
    if (start == end) continue;
    Tensor part = output.slice(0, start, end);
    at::mm_out(part, input.slice(0, start, end), weight.select(0, expert));
    start = end;
  }
  return output;
}

TORCH_LIBRARY(transformers, library) { library.def("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor"); }
TORCH_LIBRARY_IMPL(transformers, CPU, library) { library.impl("grouped_mm_fallback", &grouped_mm); }

using Package = torch::inductor::AOTIModelPackageLoader;

constexpr const char* kUsage =
    "usage: polar_run BUNDLE --tokens 1,2,3 [options]\n"
    "Generates greedily from a polar_fx bundle and prints the new token ids on one line.\n"
    "  --tokens IDS       the prompt\n"
    "  --program PATH     such as \"0-4 (5-6)*2@0.5 7-29\"; by default the bundle's first program\n"
    "  --any-program      run a program that the bundle does not name\n"
    "  --new N            at most so many tokens (16); an end-of-text token stops earlier\n"
    "  --steps            print the program's steps, 'layer opens closes...' a line, and load nothing\n"
    "  --sizes-only       do not hash the files, which takes seconds for large models\n"
    "Exit codes: 0, 2 for what is refused (arguments, a bundle that is damaged or not for this machine), 1 for other errors.\n";

// One call with everything that does not change from token to token.
struct LinkedCall {
  Package* code = nullptr;
  std::vector<size_t> sides;
  Tensors weights;

  // The operands in the order of polar_fx.library.steps: hidden state, side values, keys and values, weights.
  Tensors operator()(const Tensors& first, const Tensors& values, const Tensors& kv) const {
    Tensors operands = first;
    for (const size_t side : sides) operands.push_back(values.at(side));
    operands.insert(operands.end(), kv.begin(), kv.end());
    operands.insert(operands.end(), weights.begin(), weights.end());
    return code->boxed_run(std::move(operands));
  }
};

// A program's calls for one token or for many.
struct LinkedProgram {
  LinkedCall prologue, epilogue;
  std::vector<LinkedCall> steps;  // of many tokens, the last ones run for one token alone: see `Session::append_many`
};

// For each step the one whose slot it takes: itself, or the latest step before it of the layer whose keys and values it reads.
std::vector<size_t> slot_steps(const Bundle& bundle, const Program& program) {
  std::map<size_t, size_t> latest;
  std::vector<size_t> found;
  for (size_t i = 0; i < program.size(); ++i) {
    const auto layer = static_cast<size_t>(program[i].layer);
    const size_t owner = bundle.owners.at(layer);
    if (owner == layer) latest[layer] = i;
    if (!latest.contains(owner))
      throw Refused("program", "layer " + std::to_string(layer) + " reads the keys and values of layer " + std::to_string(owner) +
                                   ", which it skips before; keep layer " + std::to_string(owner) + " before layer " +
                                   std::to_string(layer));
    found.push_back(latest[owner]);
  }
  return found;
}

// Keys and values of one row, and its states, apart for each step: a layer that runs twice must not append twice to the same ones.
//
// Code for slots takes [1, H, L, E], all of L = `kv_length` columns. Code for blocks takes stores [P, H, 16, E] and the numbers of
// the row's blocks i64[1, W]; here the row has a store of its own at each step, whose blocks are in order, and which grows.
class KeysAndValues {
 public:
  KeysAndValues(const Bundle& bundle, const Program& program)
      : in_blocks_(bundle.kv_length == 0), slot_steps_(slot_steps(bundle, program)) {
    for (const Step& step : program) {
      const KvSpec& spec = bundle.kv_specs.at(static_cast<size_t>(step.layer));
      const int64_t first = in_blocks_ ? kLeastBlocks : 1, columns = in_blocks_ ? kBlock : bundle.kv_length;
      // zeros, not empty: masked columns are multiplied by zero, and 0 * NaN is NaN
      Tensors& parts = steps_.emplace_back();
      for (const ColumnsSpec& part : spec.columns)
        parts.push_back(at::zeros({first, part.heads, columns, part.size}, part.dtype));
      for (const StateSpec& state : spec.states) {
        std::vector<int64_t> size = {1};
        size.insert(size.end(), state.size.begin(), state.size.end());
        parts.push_back(at::zeros(size, state.dtype));
      }
    }
    columns = at::arange(in_blocks_ ? kLeastBlocks * kBlock : bundle.kv_length);
    if (in_blocks_) row_blocks_ = at::arange(kLeastBlocks).unsqueeze(0);
  }

  // Makes room for a row of so many tokens.
  void reserve(int64_t tokens) {
    const int64_t needed = std::max(kLeastBlocks, (tokens + kBlock - 1) / kBlock);
    if (!in_blocks_ || needed == row_blocks_.size(1)) return;
    row_blocks_ = at::arange(needed).unsqueeze(0);
    columns = at::arange(needed * kBlock);
    for (Tensors& step : steps_)
      for (Tensor& store : step) {
        if (store.size(0) >= needed) continue;
        const int64_t more = std::max(needed - store.size(0), store.size(0) / 8);
        store = at::cat({store, at::zeros({more, store.size(1), store.size(2), store.size(3)}, store.options())});
      }
  }

  // What the code of a step takes.
  Tensors of(size_t step) const {
    Tensors taken = steps_.at(slot_steps_.at(step));
    if (in_blocks_ && !taken.empty()) taken.push_back(row_blocks_);
    return taken;
  }

  Tensor columns;  // i64[L], the numbers of the columns that code is given

 private:
  static constexpr int64_t kBlock = 16, kLeastBlocks = 2;  // regions are compiled for two blocks or more

  bool in_blocks_;
  Tensor row_blocks_;
  std::vector<size_t> slot_steps_;
  std::vector<Tensors> steps_;  // of a step that reads the slot of another one, nothing
};

// A program on one row.
class Session {
 public:
  Session(Bundle& bundle, const Program& program, bool many_tokens)
      : bundle_(bundle), program_(program), kv_(bundle, program) {
    find_ending();
    one_ = link(false);
    if (many_tokens) many_ = link(true);
  }

  // Appends the prompt, in the parts that Python would; logits [1, 1, V] of its last token.
  Tensor prefill(const std::vector<int64_t>& prompt) {
    const auto total = static_cast<int64_t>(prompt.size());
    const Tensor ids = at::arange(total);
    std::copy(prompt.begin(), prompt.end(), ids.mutable_data_ptr<int64_t>());
    Tensor logits;
    for (int64_t start = 0; start < total; start += bundle_.prefill_chunk) {
      const int64_t tokens = std::min(bundle_.prefill_chunk, total - start);
      const Tensor part = ids.narrow(0, start, tokens).clone().unsqueeze(0);
      logits = tokens == 1 ? append_one(part) : append_many(part, start + tokens == total);
    }
    return logits;
  }

  // Appends one token; logits [1, 1, V].
  Tensor decode(int64_t token) { return append_one(at::zeros({1, 1}, at::kLong).fill_(token)); }

 private:
  LinkedProgram link(bool many_tokens) {
    LinkedProgram made;
    made.prologue = link(bundle_.prologue, "", many_tokens);
    made.prologue.sides = {};  // its operands are the graph's inputs themselves, in order
    if (!many_tokens) made.epilogue = link(bundle_.epilogue, "", many_tokens);  // logits are wanted of one token only
    const size_t num_whole = many_tokens ? program_.size() - num_last_ : program_.size();
    for (size_t i = 0; i < num_whole + (many_tokens && cut_ ? 1 : 0); ++i) {
      const Call& call = bundle_.layers.at(static_cast<size_t>(program_[i].layer));
      made.steps.push_back(link(call, i == num_whole ? ".kv" : "", many_tokens));
    }
    return made;
  }

  // As `polar_fx.library.symbols.SymbolTable.ending` says.
  void find_ending() {
    for (size_t i = program_.size(); i-- > 0; ++num_last_) {
      const auto layer = static_cast<size_t>(program_[i].layer);
      if (bundle_.owners[layer] != layer) continue;
      cut_ = bundle_.kv_specs.at(layer).ends_in_kv_writes();
      num_last_ += cut_ ? 1 : 0;
      return;
    }
  }

  LinkedCall link(const Call& call, const char* suffix, bool many_tokens) {
    LinkedCall made{nullptr, call.sides, {}};
    const std::string path = bundle_.package(call.target + suffix, many_tokens);
    auto& package = packages_[path];
    if (!package) package = std::make_unique<Package>(path, "model", false, 1, -1);
    made.code = package.get();
    for (const auto& [name, layout] : call.weights) made.weights.push_back(bundle_.weight(name, layout));
    return made;
  }

  // The side values: three inputs, and what the prologue makes of them; the first of that is the hidden state.
  Tensors start(const LinkedProgram& linked, const Tensor& ids, const Tensor& positions) const {
    Tensors values = {ids, positions, kv_.columns};
    for (Tensor& made : linked.prologue(values, {}, {})) values.push_back(std::move(made));
    return values;
  }

  static void close(const Step& step, Tensors& saved, Tensor& hidden) {
    for (const double damping : step.closes) {
      hidden = at::lerp(saved.back(), hidden, damping);
      saved.pop_back();
    }
  }

  // The steps from `first` to before `stop`. `saved` holds the hidden states of blends that are still open.
  Tensor run(const LinkedProgram& linked, size_t first, size_t stop, Tensor hidden, const Tensors& values, Tensors& saved) const {
    for (size_t i = first; i < stop; ++i) {
      saved.insert(saved.end(), static_cast<size_t>(program_[i].opens), hidden);
      hidden = linked.steps[i]({hidden}, values, kv_.of(i)).at(0);
      close(program_[i], saved, hidden);
    }
    return hidden;
  }

  Tensor append_one(const Tensor& ids) {
    const Tensors values = start(one_, ids, next_positions(1));
    Tensors saved;
    return head(run(one_, 0, program_.size(), values.at(3), values, saved), values);
  }

  // Of the last steps only keys and values are needed for all tokens: `cut_` tells that the first of these steps writes some,
  // and the others only read. What comes after runs for the last token alone, as if it were decoded, and not at all for a part
  // of a prompt that does not end here. A step that keeps a state runs whole, once.
  Tensor append_many(const Tensor& ids, bool is_end) {
    const size_t first = program_.size() - num_last_;
    const Tensor positions = next_positions(ids.size(1));
    Tensors values = start(many_, ids, positions), saved;
    Tensor hidden = run(many_, 0, first, values.at(3), values, saved);
    if (cut_) many_.steps.back()({hidden}, values, kv_.of(first));
    if (!is_end) return {};
    const auto pick = [](const Tensor& all) { return all.narrow(1, all.size(1) - 1, 1).clone(at::MemoryFormat::Contiguous); };
    for (Tensor& state : saved) state = pick(state);
    values = start(one_, pick(ids), pick(positions));
    return head(run(one_, first, program_.size(), pick(hidden), values, saved), values);
  }

  Tensor head(const Tensor& hidden, const Tensors& values) const { return one_.epilogue({hidden}, values, {}).at(0); }

  Tensor next_positions(int64_t tokens) {
    num_tokens_ += tokens;
    kv_.reserve(num_tokens_);
    return at::arange(num_tokens_ - tokens, num_tokens_).unsqueeze(0);
  }

  Bundle& bundle_;
  const Program& program_;
  std::map<std::string, std::unique_ptr<Package>> packages_;  // a region is loaded once, however often its layer runs
  size_t num_last_ = 0;  // steps that run for the last token of a prompt alone
  bool cut_ = false;     // whether the first of them runs for the keys and values of all its tokens before
  LinkedProgram one_, many_;
  KeysAndValues kv_;
  int64_t num_tokens_ = 0;
};

struct Arguments {
  std::string bundle;
  std::optional<std::string> program;
  std::vector<int64_t> tokens;
  int64_t num_new = 16;
  bool any_program = false, steps = false, sizes_only = false;
};

int64_t whole(const std::string& text, const std::string& option) {
  int64_t number = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || stop != text.data() + text.size()) throw Refused(option, "'" + text + "' is no whole number");
  return number;
}

Arguments parse(int count, char** values) {
  Arguments made;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    const auto value = [&]() -> std::string {
      if (++i >= count) throw Refused(name, "needs a value; see polar_run --help");
      return values[i];
    };
    if (name == "--program") {
      made.program = value();
    } else if (name == "--tokens") {
      const std::string text = value();
      for (size_t start = 0, end = 0; end != std::string::npos; start = end + 1) {
        end = text.find(',', start);
        made.tokens.push_back(whole(text.substr(start, end - start), name));
      }
    } else if (name == "--new") {
      made.num_new = whole(value(), name);
      if (made.num_new < 1) throw Refused(name, "give at least 1");
    } else if (name == "--any-program") {
      made.any_program = true;
    } else if (name == "--steps") {
      made.steps = true;
    } else if (name == "--sizes-only") {
      made.sizes_only = true;
    } else if (name.starts_with("--") || !made.bundle.empty()) {
      throw Refused(name, "is no option of polar_run; see polar_run --help");
    } else {
      made.bundle = name;
    }
  }
  if (made.bundle.empty()) throw Refused("BUNDLE", "name the folder of a bundle; see polar_run --help");
  if (made.tokens.empty() && !made.steps) throw Refused("--tokens", "a prompt needs at least one token");
  return made;
}

void check_named(const Bundle& bundle, const Program& program, const std::string& text) {
  for (const std::string& named : bundle.programs)
    if (ProgramReader::read(named, bundle.depth) == program) return;
  throw Refused("program '" + text + "'",
                "is not among the " + std::to_string(bundle.programs.size()) +
                    " programs of the bundle; add it with polar_fx.bundle.add_program, or say --any-program");
}

void print_steps(const Program& program) {
  for (const Step& step : program) {
    std::cout << step.layer << ' ' << step.opens;
    for (const double damping : step.closes) {
      char digits[32];
      std::cout << ' ' << std::string_view(digits, std::to_chars(digits, digits + sizeof digits, damping).ptr);
    }
    std::cout << '\n';
  }
}

void generate(Bundle& bundle, const Program& program, const Arguments& arguments) {
  for (const int64_t token : arguments.tokens)
    if (token < 0 || token >= bundle.vocab_size)
      throw Refused("--tokens", std::to_string(token) + " is outside the vocabulary 0.." + std::to_string(bundle.vocab_size - 1));
  const auto num_prompt = static_cast<int64_t>(arguments.tokens.size());
  if (num_prompt > bundle.max_length || arguments.num_new - 1 > bundle.max_length - num_prompt)  // the last one is never fed back
    throw Refused("--new", "a prompt of " + std::to_string(num_prompt) + " tokens and " + std::to_string(arguments.num_new) +
                               " new ones exceed the " + std::to_string(bundle.max_length) + " that the bundle holds");
  if (bundle.frequency_switch > 0 && num_prompt <= bundle.frequency_switch &&
      num_prompt + arguments.num_new - 1 > bundle.frequency_switch)
    throw Refused("--new", "past " + std::to_string(bundle.frequency_switch) +
                               " tokens this model computes a whole row with other rotary frequencies; ask for fewer new ones, "
                               "or generate with polar_fx.load_bundle");
  bundle.check_files();
  const at::NoGradGuard no_grad;
  Session session(bundle, program, std::min(num_prompt, bundle.prefill_chunk) > 1);
  Tensor logits = session.prefill(arguments.tokens);
  for (int64_t made = 1;; ++made) {
    const auto token = at::argmax(logits.to(at::kFloat)).item<int64_t>();
    std::cout << (made > 1 ? "," : "") << token << std::flush;
    const bool is_end = std::find(bundle.end_tokens.begin(), bundle.end_tokens.end(), token) != bundle.end_tokens.end();
    if (is_end || made == arguments.num_new) break;
    logits = session.decode(token);
  }
  std::cout << std::endl;
}

int main(int count, char** values) {
  if (count > 1 && std::string(values[1]) == "--help") return std::cout << kUsage, 0;
  try {
    const Arguments arguments = parse(count, values);
    Bundle bundle(arguments.bundle, !arguments.sizes_only);
    const std::string text = arguments.program.value_or(bundle.programs.front());
    const Program program = ProgramReader::read(text, bundle.depth);
    if (!arguments.any_program) check_named(bundle, program, text);
    if (arguments.steps) print_steps(program);
    else generate(bundle, program, arguments);
    return 0;
  } catch (const Refused& error) {
    std::cerr << "polar_run: " << error.what() << std::endl;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "polar_run: " << error.what() << std::endl;
    return 1;
  }
}
