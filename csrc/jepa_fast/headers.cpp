// Headers of a tar file: the everyday ones of jepa_fast/data/shards/tar.py, outside Python's lock.
//
// In: an open file and a byte of it where a member begins. Out: the regular members from there on, up to the first that
// takes more to understand: a long name, a link, the end, damage. tar.py reads that one, and asks again behind it.

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "module.h"

namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kSmall = 4096, kLarge = 1 << 20;  // as in tar.py
constexpr int64_t kMostContent = 512;               // bytes of a payload that are given along: a class, a caption

struct Member {
    std::string name;
    int64_t begin, data, size;
    std::optional<std::string> content;
};

int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// Bytes of a file by position; Window of tar.py.
class Window {
 public:
    explicit Window(int descriptor) : descriptor_(descriptor), bytes_(new char[kLarge]) {}

    // Empty where the file ends before, or cannot be read: what that means is for tar.py to say.
    std::string_view get(int64_t at, int64_t count) {
        if (!holds(at, count)) {
            const bool near = start_ <= at && at - start_ <= held_ + kBlock;
            reach_ = near ? std::min(kLarge, 4 * reach_) : kSmall;
            start_ = at;
            held_ = std::max<int64_t>(0, pread(descriptor_, bytes_.get(), std::max(count, reach_), at));
        }
        return holds(at, count) ? std::string_view(bytes_.get() + (at - start_), count) : std::string_view();
    }

    bool holds(int64_t at, int64_t count) const { return start_ <= at && count <= held_ - (at - start_); }

 private:
    int descriptor_;
    std::unique_ptr<char[]> bytes_;  // kLarge, the most that is asked for
    int64_t start_ = 0, held_ = 0, reach_ = kSmall;
};

std::string_view up_to_nul(std::string_view field) { return field.substr(0, field.find('\0')); }

// Octal digits, then blanks.
std::optional<int64_t> number(std::string_view field) {
    const size_t digits = std::min(field.find_first_not_of("01234567"), field.size());
    if (digits == 0 || field.find_first_not_of(std::string_view(" \0", 2), digits) != field.npos) return {};
    int64_t value = 0;
    for (const char digit : field.substr(0, digits)) value = 8 * value + (digit - '0');
    return value;
}

// Whether the sum of all bytes, its own counted as blanks, is what the header says. tar.py knows of signed sums.
bool sums_up(std::string_view header) {
    int64_t sum = 8 * ' ';
    for (const char byte : header) sum += static_cast<uint8_t>(byte);
    for (const char byte : header.substr(148, 8)) sum -= static_cast<uint8_t>(byte);
    return number(header.substr(148, 8)) == sum;
}

// Whether attributes 'length key=value\n' are readable and change nothing that is asked here: times, owners.
bool harmless(std::string_view records) {
    while (!records.empty()) {
        const size_t digits = std::min(records.find_first_not_of("0123456789"), records.size());
        if (digits == 0 || digits > 7 || digits == records.size() || records[digits] != ' ') return false;
        const size_t length = std::stoul(std::string(records.substr(0, digits)));
        if (length <= digits + 1 || length > records.size()) return false;
        const std::string_view record = records.substr(digits + 1, length - digits - 2);
        const std::string_view key = record.substr(0, record.find('='));
        if (key == "path" || key == "size" || key.substr(0, 11) == "GNU.sparse.") return false;
        records.remove_prefix(length);
    }
    return true;
}

// The plain member whose headers begin at `begin`.
std::optional<Member> member_at(Window* window, int64_t begin, int64_t end) {
    int64_t at = begin;
    for (bool attributes = false;; attributes = true) {
        const std::string_view header = window->get(at, kBlock);
        if (header.empty() || header.substr(257, 5) != "ustar" || !header[0] || !sums_up(header)) return {};
        const std::optional<int64_t> size = number(header.substr(124, 12));
        const int64_t data = at + kBlock;
        const char kind = header[156];
        if (!size || *size > end - data) return {};
        if (kind == 'x' && !attributes && *size > 0 && *size <= kLarge) {
            const std::string_view records = window->get(data, *size);
            if (records.empty() || !harmless(records)) return {};
            at = data + padded(*size);
            continue;
        }
        if (kind != '0' && kind != '\0' && kind != '7') return {};
        std::string name(up_to_nul(header.substr(0, 100)));
        if (header[345] && header[262] == '\0') name = std::string(up_to_nul(header.substr(345, 155))) + "/" + name;
        std::optional<std::string> content;
        if (*size <= kMostContent && window->holds(data, *size)) content = window->get(data, *size);
        return Member{std::move(name), begin, data, *size, std::move(content)};
    }
}

py::tuple plain_members(int descriptor, int64_t at, int64_t end, int64_t most) {
    std::vector<Member> found;
    {
        const py::gil_scoped_release release;
        Window window(descriptor);
        end = std::min(end, std::numeric_limits<int64_t>::max() - 2 * kBlock);  // so that no position overflows
        while (0 <= at && at <= end && static_cast<int64_t>(found.size()) < most) {
            std::optional<Member> member = member_at(&window, at, end);
            if (!member) break;
            at = member->data + padded(member->size);
            found.push_back(std::move(*member));
        }
    }
    py::list members(found.size());
    for (size_t i = 0; i < found.size(); ++i) {
        const Member& m = found[i];
        const py::object content = m.content ? py::object(py::bytes(*m.content)) : py::none();
        members[i] = py::make_tuple(py::bytes(m.name), m.begin, m.data, m.size, content);
    }
    return py::make_tuple(members, at);
}

}  // namespace

void define_headers(py::module_& m) {
    m.def("plain_members", &plain_members, py::arg("descriptor"), py::arg("at"), py::arg("end"), py::arg("most"));
}
