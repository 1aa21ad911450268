// Ripple-carry adders for the smallest netlists, in place of Yosys's parallel-prefix ones: a technology map of $alu.
(* techmap_celltype = "$alu" *)
module ripple_alu (A, B, CI, BI, X, Y, CO);
    parameter A_SIGNED = 0, B_SIGNED = 0, A_WIDTH = 1, B_WIDTH = 1, Y_WIDTH = 1;
    // A negation is 0 - B, whose A has no bits at all: a zero stands in for it.
    localparam A_BITS = A_WIDTH > 0 ? A_WIDTH : 1, B_BITS = B_WIDTH > 0 ? B_WIDTH : 1;
    input [A_BITS-1:0] A;
    input [B_BITS-1:0] B;
    input CI, BI;
    output [Y_WIDTH-1:0] X, Y, CO;

    wire [Y_WIDTH-1:0] a, b_extended;
    \$pos #(.A_SIGNED(A_SIGNED), .A_WIDTH(A_BITS), .Y_WIDTH(Y_WIDTH)) extend_a (.A(A_WIDTH > 0 ? A : 1'b0), .Y(a));
    \$pos #(.A_SIGNED(B_SIGNED), .A_WIDTH(B_BITS), .Y_WIDTH(Y_WIDTH)) extend_b (.A(B_WIDTH > 0 ? B : 1'b0), .Y(b_extended));
    wire [Y_WIDTH-1:0] b = b_extended ^ {Y_WIDTH{BI}};
    wire [Y_WIDTH:0] carry;
    assign carry[0] = CI;
    assign carry[Y_WIDTH:1] = (a & b) | (X & carry[Y_WIDTH-1:0]);
    assign X = a ^ b;
    assign Y = X ^ carry[Y_WIDTH-1:0];
    assign CO = carry[Y_WIDTH:1];
endmodule
