// Stands in front of a program that reads input.txt and writes output.txt: they become its input and output.
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
namespace files_of_the_problem {
static int channel = -1;
static void copy_out() {
    std::fflush(nullptr);
    std::FILE* written = std::fopen("output.txt", "rb");
    if (written == nullptr) return;
    char block[65536];
    for (std::size_t n; (n = std::fread(block, 1, sizeof block, written)) > 0;)
        for (std::size_t done = 0; done < n;) {
            ssize_t sent = ::write(channel, block + done, n - done);
            if (sent <= 0) return;
            done += sent;
        }
}
struct Copied {
    Copied() {
        std::FILE* given = std::fopen("input.txt", "wb");
        char block[65536];
        for (ssize_t n; given != nullptr && (n = ::read(0, block, sizeof block)) > 0;) std::fwrite(block, 1, n, given);
        if (given != nullptr) std::fclose(given);
        channel = ::dup(1);
    }
    ~Copied() { copy_out(); }
};
static Copied copied;
}
#line 1 "solution.cpp"
