// The pixels that `load_picture` makes of a file, as bytes on standard output: for the test.
#include <cstdlib>
#include <exception>
#include <iostream>

#include "picture.hpp"

int main(int count, char** arguments) {
    if (count != 6) return 2;  // HEIGHT WIDTH CHANNELS RESIZE PICTURE
    try {
        const Manifest manifest{std::atoi(arguments[1]), std::atoi(arguments[2]), std::atoi(arguments[3]),
                                arguments[4], {}, 1, {}};
        for (std::uint8_t pixel : load_picture(arguments[5], manifest)) std::cout.put(char(pixel));
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
