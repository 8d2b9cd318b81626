// A reader of strict JSON, as far as bundles need it: no name twice in one object, limited depth, whole numbers kept exact.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  static Json parse(std::string_view text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.skip();
    if (reader.at != text.size()) reader.fail("text behind the end");
    return value;
  }

  bool has(const std::string& name) const { return kind_ == Kind::object && object_.count(name); }

  const Json& operator[](const std::string& name) const {
    const auto& fields = object();
    const auto found = fields.find(name);
    if (found == fields.end()) throw JsonError("the field \"" + name + "\" is missing");
    return found->second;
  }

  const std::map<std::string, Json>& object() const { return require(Kind::object, "an object"), object_; }
  const std::vector<Json>& list() const { return require(Kind::list, "a list"), list_; }
  const std::string& text() const { return require(Kind::text, "text"), text_; }
  bool is_list() const { return kind_ == Kind::list; }
  bool is_null() const { return kind_ == Kind::null; }

  int64_t whole() const {
    require(Kind::number, "a number");
    int64_t number = 0;
    const char* end = text_.data() + text_.size();
    const auto [stop, error] = std::from_chars(text_.data(), end, number);
    if (error != std::errc() || stop != end) throw JsonError(text_.substr(0, 40) + " is no whole number of 64 bits");
    return number;
  }

  int64_t size() const {  // of something that is there, so not negative
    const int64_t number = whole();
    if (number < 0) throw JsonError(text_ + " is negative");
    return number;
  }

 private:
  enum class Kind { null, boolean, number, text, list, object };

  void require(Kind kind, const char* what) const {
    if (kind_ != kind) throw JsonError(std::string("there must be ") + what + " where there is something else");
  }

  struct Reader {
    std::string_view in;
    size_t at = 0;

    [[noreturn]] void fail(const std::string& what) const {
      throw JsonError("is not valid JSON: " + what + " at byte " + std::to_string(at));
    }
    void skip() {
      while (at < in.size() && std::string_view(" \t\r\n").find(in[at]) != std::string_view::npos) ++at;
    }
    bool accept(std::string_view word) {
      if (in.substr(at, word.size()) != word) return false;
      at += word.size();
      return true;
    }
    void expect(std::string_view word) {
      skip();
      if (!accept(word)) fail("expected " + std::string(word));
    }

    Json value(int depth) {
      if (depth > 64) fail("too deep nesting");
      skip();
      Json made;
      if (accept("{")) {
        made.kind_ = Kind::object;
        skip();
        if (accept("}")) return made;
        do {
          skip();
          std::string name = string();
          expect(":");
          if (!made.object_.emplace(name, value(depth + 1)).second) fail("the name \"" + name + "\" twice");
          skip();
        } while (accept(","));
        expect("}");
      } else if (accept("[")) {
        made.kind_ = Kind::list;
        skip();
        if (accept("]")) return made;
        do {
          made.list_.push_back(value(depth + 1));
          skip();
        } while (accept(","));
        expect("]");
      } else if (at < in.size() && in[at] == '"') {
        made.kind_ = Kind::text;
        made.text_ = string();
      } else if (accept("true") || accept("false")) {
        made.kind_ = Kind::boolean;  // no boolean of a bundle matters here
      } else if (!accept("null")) {
        made.kind_ = Kind::number;
        const size_t end = std::min(in.find_first_not_of("+-.0123456789eE", at), in.size());
        if (end == at) fail("no value");
        made.text_ = in.substr(at, end - at);
        at = end;
      }
      return made;
    }

    std::string string() {
      if (!accept("\"")) fail("expected \"");
      std::string made;
      while (true) {
        if (at >= in.size() || static_cast<unsigned char>(in[at]) < 0x20) fail("text that does not end");
        const char c = in[at++];
        if (c == '"') return made;
        if (c != '\\') {
          made += c;
          continue;
        }
        constexpr std::string_view names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
        const char escape = at < in.size() ? in[at++] : '\0';
        if (const size_t which = names.find(escape); escape && which != std::string_view::npos) {
          made += meant[which];
        } else if (escape == 'u') {
          uint32_t code = hex();
          if (code >= 0xD800 && code < 0xDC00 && accept("\\u")) code = 0x10000 + ((code - 0xD800) << 10) + (hex() - 0xDC00);
          append_utf8(made, code);
        } else {
          fail("an unknown escape");
        }
      }
    }

    uint32_t hex() {
      uint32_t code = 0;
      const auto digits = in.substr(at, 4);
      const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
      if (error != std::errc() || stop != digits.data() + 4) fail("a malformed escape");
      at += 4;
      return code;
    }

    static void append_utf8(std::string& out, uint32_t code) {
      const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
      if (code < 0x80) {
        out += static_cast<char>(code);
      } else if (code < 0x800) {
        out += static_cast<char>(0xC0 | (code >> 6)), tail(0);
      } else if (code < 0x10000) {
        out += static_cast<char>(0xE0 | (code >> 12)), tail(6), tail(0);
      } else {
        out += static_cast<char>(0xF0 | (code >> 18)), tail(12), tail(6), tail(0);
      }
    }
  };

  Kind kind_ = Kind::null;
  std::string text_;  // of a number: its digits
  std::vector<Json> list_;
  std::map<std::string, Json> object_;
};
