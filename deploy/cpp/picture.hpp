// Pictures on their way in: a file to the pixels that the model takes, as runtime.images prepares them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.hpp"

// Return uint8 [H, W, C] of the model's size: cropped and resized as Pillow does it (BILINEAR, antialiased) within
// one level, grey by BT.601. Throws std::runtime_error where the file is no picture, has more than 50 million
// pixels, or has another size and the manifest does not allow it to be resized.
//
// stb_image reads PNG, JPEG, BMP, GIF, TGA and binary PNM. It does not turn photos by their EXIF orientation, and
// its JPEG decoder differs by some levels from libjpeg's.
std::vector<std::uint8_t> load_picture(const std::string& path, const Manifest& manifest);
