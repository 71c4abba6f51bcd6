#include "picture.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>

#define STB_IMAGE_IMPLEMENTATION
#define STBI_FAILURE_USERMSG
#include <stb_image.h>

namespace {

constexpr double kMaxPixels = 50e6;

struct Taps {  // of one pixel of the result: its first source pixel, and the weights from there on
    int first;
    std::vector<double> weights;
};

// A triangle filter as wide as one pixel of the result; weights are multiples of 2^-22, as in Pillow.
std::vector<Taps> taps_of(int source, int target) {
    const double ratio = double(source) / target, support = std::max(ratio, 1.0);
    std::vector<Taps> found;
    for (int i = 0; i < target; i++) {
        const double center = (i + 0.5) * ratio;
        Taps taps{std::max(0, int(std::floor(center - support + 0.5))), {}};
        double sum = 0;
        for (int at = taps.first; at < std::min(source, int(std::floor(center + support + 0.5))); at++)
            sum += taps.weights.emplace_back(std::max(0.0, 1 - std::abs(at + 0.5 - center) / support));
        for (double& weight : taps.weights) weight = std::floor(weight / sum * (1 << 22) + 0.5) / (1 << 22);
        found.push_back(taps);
    }
    return found;
}

// Resize [lines, length, inner] along `length`, halves rounded up.
std::vector<std::uint8_t> along(const std::vector<std::uint8_t>& pixels, int lines, int length, int inner,
                                int target) {
    std::vector<std::uint8_t> out;
    out.reserve(std::size_t(lines) * target * inner);
    const auto taps = taps_of(length, target);
    for (int line = 0; line < lines; line++)
        for (const auto& [first, weights] : taps)
            for (int k = 0; k < inner; k++) {
                double sum = 0.5;
                const std::uint8_t* from = &pixels[(std::size_t(line) * length + first) * inner + k];
                for (double weight : weights) sum += weight * *from, from += inner;
                out.push_back(std::uint8_t(std::clamp(std::floor(sum), 0.0, 255.0)));
            }
    return out;
}

}  // namespace

std::vector<std::uint8_t> load_picture(const std::string& path, const Manifest& manifest) {
    int width, height, stored;
    const auto fail = [&path](const std::string& why) { throw std::runtime_error(path + ": " + why); };
    if (!stbi_info(path.c_str(), &width, &height, &stored))
        fail(std::string("cannot be read as a picture (") + stbi_failure_reason() + "); expected PNG, JPEG or the like");
    if (double(width) * height > kMaxPixels) fail("has more than 50,000,000 pixels; make it smaller");
    const int channels = stored <= 2 ? 1 : 3;  // transparency is left out
    std::unique_ptr<stbi_uc, void (*)(void*)> read(stbi_load(path.c_str(), &width, &height, &stored, channels),
                                                   stbi_image_free);
    if (!read) fail(std::string("is damaged (") + stbi_failure_reason() + "); save it again");
    int top = 0, left = 0, rows = height, columns = width;
    if (height != manifest.height || width != manifest.width) {
        if (manifest.resize == "none")
            fail("is of " + std::to_string(height) + "x" + std::to_string(width) + " pixels, expected " +
                 std::to_string(manifest.height) + "x" + std::to_string(manifest.width) + "; resize it");
        if (manifest.resize == "crop") {  // the largest middle part of the model's shape; halves to even
            if (std::int64_t(width) * manifest.height > std::int64_t(height) * manifest.width)
                columns = std::max(1, int(std::nearbyint(double(height) * manifest.width / manifest.height)));
            else
                rows = std::max(1, int(std::nearbyint(double(width) * manifest.height / manifest.width)));
            top = (height - rows) / 2, left = (width - columns) / 2;
        }
    }
    std::vector<std::uint8_t> pixels;
    for (int row = top; row < top + rows; row++) {
        const stbi_uc* from = read.get() + (std::size_t(row) * width + left) * channels;
        pixels.insert(pixels.end(), from, from + std::size_t(columns) * channels);
    }
    if (rows != manifest.height || columns != manifest.width) {
        pixels = along(pixels, rows, columns, channels, manifest.width);
        pixels = along(pixels, 1, rows, manifest.width * channels, manifest.height);
    }
    if (channels == manifest.channels) return pixels;
    std::vector<std::uint8_t> converted;
    for (std::size_t at = 0; at < pixels.size(); at += channels) {
        if (channels == 1)
            converted.insert(converted.end(), 3, pixels[at]);
        else  // ITU-R BT.601 luma in 16-bit fixed point
            converted.push_back((19595 * pixels[at] + 38470 * pixels[at + 1] + 7471 * pixels[at + 2] + 0x8000) >> 16);
    }
    return converted;
}
