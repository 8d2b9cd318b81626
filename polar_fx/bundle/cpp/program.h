// Programs in the path form that Python prints, such as `0-9 (10-11)*3@0.5 12-29 /30`.
//
// They are read here and not prepared by Python, so that any program can be run where there is no Python: its layers are all
// in the bundle, and the text is all that a program is. The rules are those of polar_fx/program/text.py and
// Program.schedule(); the tests hold both against each other.
#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "refused.h"

// One executed layer. Before it, the hidden state is saved `opens` times; after it, for each damping of `closes`, the last
// saved state s is taken back and h becomes s + damping * (h - s).
struct Step {
  int64_t layer;
  int opens = 0;
  std::vector<double> closes;
  bool operator==(const Step&) const = default;
};

using Program = std::vector<Step>;

class ProgramReader {
 public:
  // The steps of `text` in a model of `depth` layers. Throws Refused, naming the place of a mistake.
  static Program read(std::string_view text, int64_t depth) { return ProgramReader(text, depth).steps(); }

 private:
  static constexpr size_t kMaxSteps = 4096;  // as in Python: a typing mistake must not cost the machine's memory

  // The steps laid out so far inside one pair of brackets, or at top level.
  struct Frame {
    char opener = '\0';
    std::vector<int64_t> path;
    std::map<std::pair<size_t, size_t>, double> blends;  // over steps first .. second - 1

    void append(const Frame& body, double damping) {
      const size_t base = path.size();
      path.insert(path.end(), body.path.begin(), body.path.end());
      for (const auto& [steps, each] : body.blends) blends[{base + steps.first, base + steps.second}] = each;
      if (damping < 1) blends.try_emplace({base, path.size()}, 1.0).first->second *= damping;
    }
  };

  ProgramReader(std::string_view text, int64_t depth) : whole_text_(text), text_(text), depth_(depth) { cut_depth(); }

  Program steps() {
    const Frame whole = items();
    Program made;
    for (const int64_t layer : whole.path) made.push_back({layer, 0, {}});
    // from the last start to the first: where several blends end together, the inner ones close first
    for (auto blend = whole.blends.rbegin(); blend != whole.blends.rend(); ++blend) {
      ++made[blend->first.first].opens;
      made[blend->first.second - 1].closes.push_back(blend->second);
    }
    return made;
  }

  Frame items() {
    std::vector<Frame> frames(1);  // an explicit stack: deep nesting must not overflow the real one
    skip();
    if (accept("identity")) {
      for (int64_t layer = 0; layer < depth_; ++layer) frames[0].path.push_back(layer);
      finish();
      return frames[0];
    }
    bool after_item = false;
    while (true) {
      skip();
      const size_t start = at_;
      const char next = at_ < text_.size() ? text_[at_] : '\0';
      if (next >= '0' && next <= '9') {
        append(frames.back(), layers(), 1, 1.0, start);
        after_item = true;
      } else if (next == '(' || next == '[') {
        ++at_;
        frames.push_back({next, {}, {}});
        after_item = false;
      } else if (!after_item) {
        fail("expected layers such as 0-4 6-29, or a group such as (10-11)*2", start);
      } else if (next == ',') {
        ++at_;
        after_item = false;
      } else if (next == ')' || next == ']') {
        ++at_;
        if (frames.back().opener != (next == ')' ? '(' : '[')) fail("this bracket closes none", start);
        const Frame body = std::move(frames.back());
        frames.pop_back();
        int64_t times = 1;
        if (next == ')') {
          expect('*', "a group repeats, as in (10-11)*2");
          times = whole("times", 2, 999'999'999);
        }
        const bool damped = next == ']' || peek() == '@';
        if (damped) expect('@', "a bracket blends one pass, as in [10-11]@0.5");
        append(frames.back(), body, times, damped ? damping() : 1.0, start);
      } else if (frames.size() > 1) {
        fail("a bracket is not closed before this", start);
      } else {
        finish();
        return frames[0];
      }
    }
  }

  // Reads `/ depth` off the end, before all else: layers of another model would only be out of range.
  void cut_depth() {
    const size_t slash = text_.find('/');
    if (slash == std::string_view::npos) return;
    at_ = slash + 1;
    const int64_t stated = whole("the depth", 1, kMaxSteps);
    finish();
    if (stated != depth_)
      fail("the program is for " + std::to_string(stated) + " layers, the bundle has " + std::to_string(depth_), slash);
    text_ = text_.substr(0, slash);
    at_ = 0;
  }

  void finish() {
    skip();
    if (at_ != text_.size()) fail("unexpected text", at_);
  }

  Frame layers() {
    const size_t start = at_;
    const int64_t first = whole("layer", 0, depth_ - 1);
    const int64_t last = peek() == '-' ? (++at_, whole("layer", 0, depth_ - 1)) : first;
    if (last < first) fail("the range descends; list descending layers one by one", start);
    Frame made;
    for (int64_t layer = first; layer <= last; ++layer) made.path.push_back(layer);
    return made;
  }

  void append(Frame& frame, const Frame& body, int64_t times, double damping, size_t start) const {
    if (frame.path.size() + body.path.size() * static_cast<size_t>(times) > kMaxSteps)
      fail("this makes more than " + std::to_string(kMaxSteps) + " steps", start);
    for (int64_t run = 0; run < times; ++run) frame.append(body, run || times == 1 ? damping : 1.0);
  }

  int64_t whole(const std::string& what, int64_t low, int64_t high) {
    skip();
    const size_t start = at_;
    int64_t number = 0;
    const char* from = text_.data() + at_;
    const auto [stop, error] = std::from_chars(from, text_.data() + text_.size(), number);
    if (error != std::errc() || number < low || number > high || *from == '-')
      fail(what + " must be a whole number from " + std::to_string(low) + " to " + std::to_string(high), start);
    at_ += static_cast<size_t>(stop - from);
    return number;
  }

  double damping() {
    skip();
    double number = 0;
    const char* from = text_.data() + at_;
    const auto [stop, error] = std::from_chars(from, text_.data() + text_.size(), number);
    if (error != std::errc() || !(number > 0 && number <= 1)) fail("damping must be a number above 0 and at most 1", at_);
    at_ += static_cast<size_t>(stop - from);
    return number;
  }

  char peek() {
    skip();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  void skip() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool accept(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  void expect(char sign, const char* why) {
    if (peek() != sign) fail(std::string("expected '") + sign + "': " + why, at_);
    ++at_;
  }
  [[noreturn]] void fail(const std::string& reason, size_t at) const {
    throw Refused("program '" + std::string(whole_text_) + "'", "column " + std::to_string(at + 1) + ": " + reason);
  }

  std::string_view whole_text_, text_;
  int64_t depth_;
  size_t at_ = 0;
};
